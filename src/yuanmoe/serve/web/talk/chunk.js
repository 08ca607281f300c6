// One chunk of a streamed answer, from either kind of completion, in one form. Source: the OpenAI API's chat completion
// chunk and completion objects, with this server's `routing`.

/** {text, tokens: [{bytes, logprob}], routing, finish, usage}; `routing` as the server sends it. */
export function readChunk(chunk) {
  const choice = chunk.choices?.[0];
  return {
    text: choice?.delta?.content ?? choice?.text ?? "",
    tokens: tokensOf(choice?.logprobs),
    routing: choice?.routing ?? null,
    finish: choice?.finish_reason ?? null,
    usage: chunk.usage ?? null,
  };
}

function tokensOf(logprobs) {
  const { content, tokens = [], token_logprobs: values } = logprobs ?? {};
  if (content) return content.map(({ bytes, logprob }) => ({ bytes: Uint8Array.from(bytes), logprob }));
  return tokens.map((name, at) => ({ bytes: bytesOf(name), logprob: values[at] }));
}

const ESCAPED = /^bytes:((?:\\x[0-9a-f]{2})+)$/;

/** The bytes of a token's name; part of a character is spelled `bytes:\xe6`. */
function bytesOf(name) {
  const escaped = ESCAPED.exec(name)?.[1];
  if (!escaped) return new TextEncoder().encode(name);
  return Uint8Array.from(escaped.slice(2).split("\\x"), (digits) => parseInt(digits, 16));
}
