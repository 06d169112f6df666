/**
 * Owns the shapes of OpenAI's replies: tokens as events of a stream, and a whole answer as one object.
 *
 * Invariants
 * 1. `id` is the request id itself, so that it can be cancelled and read again.
 * 2. `finish_reason` is ours: besides `stop` and `length` there is `cancelled`.
 */
import type { TokenMessage } from '@lamina/protocol';

export interface ReplyFacts {
  readonly id: string;
  readonly model: string;
  /** Unix time in seconds. */
  readonly created: number;
  readonly hasLogprobs: boolean;
}

export interface OpenAiFormat {
  /** Body of the event of one token. */
  chunk(facts: ReplyFacts, message: TokenMessage): object;
  /** Body of the event that has nothing but the usage. */
  usageChunk(facts: ReplyFacts, usage: TokenMessage['usage']): object;
  whole(facts: ReplyFacts, messages: readonly TokenMessage[]): object;
}

type TopLogprobs = NonNullable<TokenMessage['top_logprobs']>;

const withLogprob = (messages: readonly TokenMessage[]): TokenMessage[] =>
  messages.filter(({ logprob }) => logprob !== undefined);
const textOf = (messages: readonly TokenMessage[]): string => messages.map(({ text }) => text).join('');

function tokenLogprob({ text, logprob }: { text: string; logprob?: number | undefined }): object {
  return { token: text, logprob: logprob ?? null, bytes: [...Buffer.from(text)] };
}

function chatLogprobs(messages: readonly TokenMessage[]): object {
  return {
    content: withLogprob(messages).map((message) => ({
      ...tokenLogprob(message),
      top_logprobs: (message.top_logprobs ?? []).map(tokenLogprob),
    })),
    refusal: null,
  };
}

function completionLogprobs(messages: readonly TokenMessage[]): object {
  const tokens = withLogprob(messages);
  let offset = 0;
  const byText = (top: TopLogprobs): object => Object.fromEntries(top.map(({ text, logprob }) => [text, logprob]));
  return {
    tokens: tokens.map(({ text }) => text),
    token_logprobs: tokens.map(({ logprob }) => logprob ?? null),
    top_logprobs: tokens.map(({ top_logprobs }) => byText(top_logprobs ?? [])),
    text_offset: tokens.map(({ text }) => {
      offset += text.length;
      return offset - text.length;
    }),
  };
}

function reply(object: string, { id, created, model }: ReplyFacts, rest: object): object {
  return { id, object, created, model, ...rest };
}

export const CHAT: OpenAiFormat = {
  chunk(facts, message) {
    const delta = { ...(message.index === 0 && { role: 'assistant' }), content: message.text };
    const logprobs = facts.hasLogprobs ? chatLogprobs([message]) : null;
    const choice = { index: 0, delta, logprobs, finish_reason: message.finish_reason };
    return reply('chat.completion.chunk', facts, { choices: [choice] });
  },
  usageChunk: (facts, usage) => reply('chat.completion.chunk', facts, { choices: [], usage }),
  whole(facts, messages) {
    const last = messages.at(-1);
    const message = { role: 'assistant', content: textOf(messages), refusal: null };
    const logprobs = facts.hasLogprobs ? chatLogprobs(messages) : null;
    const choice = { index: 0, message, logprobs, finish_reason: last?.finish_reason };
    return reply('chat.completion', facts, { choices: [choice], usage: last?.usage });
  },
};

export const COMPLETION: OpenAiFormat = {
  chunk(facts, message) {
    const logprobs = facts.hasLogprobs ? completionLogprobs([message]) : null;
    const choice = { index: 0, text: message.text, logprobs, finish_reason: message.finish_reason };
    return reply('text_completion', facts, { choices: [choice] });
  },
  usageChunk: (facts, usage) => reply('text_completion', facts, { choices: [], usage }),
  whole(facts, messages) {
    const last = messages.at(-1);
    const logprobs = facts.hasLogprobs ? completionLogprobs(messages) : null;
    const choice = { index: 0, text: textOf(messages), logprobs, finish_reason: last?.finish_reason };
    return reply('text_completion', facts, { choices: [choice], usage: last?.usage });
  },
};
