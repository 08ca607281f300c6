// How much of the model's context a conversation takes, and what fits beside it.

/** Fewer tokens than this are no room for an answer. */
export const LEAST_ROOM = 16;

/** Tokens that an answer may have where the reader set no number: half of the context, so that a next one fits too. */
export const answerLimit = (info) => Math.floor(info.context / 2);

/** Tokens that may follow a prompt; below zero where the prompt itself is too long. */
export function roomAfter(info, promptTokens) {
  return promptTokens > info.mostPrompt ? info.mostPrompt - promptTokens : info.context - promptTokens;
}

/** Tokens of the context that are taken after that answer: its prompt, and itself. */
export const takenBy = ({ prompt, surfaces }) => (prompt ?? 0) + surfaces.length;

/** Tokens that the shown part of a conversation takes; null where nothing was counted yet. */
export function takenTokens(conversation) {
  const { leaf, from, fromTokens } = conversation.head;
  const last = conversation.above(leaf).findLast((message) => message.prompt);
  // Turns were left out or taken back since that answer.
  if (last && (last.from ?? null) !== (from ?? null)) return fromTokens ?? null;
  return last ? takenBy(last) : null;
}

/** The index of the first question from which on a conversation fits; `count(index)` says its tokens. */
export async function firstThatFits(questions, limit, count) {
  let [low, high] = [1, questions - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((await count(middle)) <= limit) high = middle;
    else low = middle + 1;
  }
  return low;
}
