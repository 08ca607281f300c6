// What the server says about its model, in the form that the page uses.

import { get } from "./api.js";

/**
 * {model, adapters: [name], parameters, active, layers: [{layer, experts}] of those that have experts, chosen,
 * gflop: {own, dense, llama} of one token, context, mostPrompt: tokens, and the checkpoint's card: kind (`chat` or
 * `completion`), languages, sampling: {name: number}, advised: [name], limits: {language: text}, suggestions:
 * {language: [text]}}.
 */
export async function readInfo() {
  const info = await get("v1/info");
  const { this: own, dense, llama3_70b: llama } = info.gflop_per_token;
  const { kind, languages, sampling, advised, limits, suggestions } = info;
  return {
    ...{ kind, languages, sampling, advised, limits, suggestions },
    model: info.model,
    adapters: info.adapters.map(({ name }) => name),
    parameters: info.parameters,
    active: info.active_parameters,
    layers: info.routed_layers.map((layer) => ({ layer, experts: info.experts_per_layer[layer] })),
    chosen: info.experts_per_token,
    gflop: { own, dense, llama },
    context: Math.min(info.context, info.cache_tokens),
    mostPrompt: info.max_prompt_tokens,
  };
}
