// What the server says about its model, in the form that the page uses.

import { get } from "./api.js";

/**
 * {model, adapters: [name], parameters, active, layers: [{layer, experts}] of those that have experts, chosen,
 * gflop: {own, dense, llama} of one token}.
 */
export async function readInfo() {
  const info = await get("v1/info");
  const { this: own, dense, llama3_70b: llama } = info.gflop_per_token;
  return {
    model: info.model,
    adapters: info.adapters.map(({ name }) => name),
    parameters: info.parameters,
    active: info.active_parameters,
    layers: info.routed_layers.map((layer) => ({ layer, experts: info.experts_per_layer[layer] })),
    chosen: info.experts_per_token,
    gflop: { own, dense, llama },
  };
}
