/**
 * Owns the comparison of one answer with the undisturbed one: what is stored of it, and what its client has received.
 *
 * Invariants
 * 1. An index twice is doubled; a token that is another, or has another text, is wrong; a missing token, a missing end, or a
 *    mistake that its client was told instead, is lost.
 */
import type { TokenMessage } from '@lamina/protocol';
import { type AnswerToken, isSame, type Received } from './clients/received.ts';

export interface Answered {
  /** Tokens that were stored twice included. */
  readonly stored: readonly TokenMessage[];
  /** Undefined for a client that reads only what is stored. */
  readonly received: Received | undefined;
}

export interface Verdict {
  readonly isLost: boolean;
  readonly numDoubled: number;
  readonly isWrong: boolean;
  /** What is not as it should be, in words. */
  readonly problems: readonly string[];
}

const tokenOf = ({ token, text }: TokenMessage): AnswerToken => ({ ...(token !== null && { token }), text });

export function compare(expected: readonly AnswerToken[], { stored, received }: Answered): Verdict {
  const problems: string[] = [];
  const byIndex = new Map<number, AnswerToken>();
  let numDoubled = received?.numDoubled ?? 0;
  if (numDoubled > 0) problems.push(`its client got ${numDoubled} tokens twice`);
  for (const message of stored) {
    if (!byIndex.has(message.index)) byIndex.set(message.index, tokenOf(message));
    else {
      numDoubled++;
      problems.push(`token ${message.index} is stored twice`);
    }
  }
  const numProblems = problems.length;
  const check = (whose: string, tokens: Iterable<[number, AnswerToken]>): void => {
    for (const [index, token] of tokens) {
      const right = expected[index];
      if (right !== undefined && !isSame(right, token))
        problems.push(`token ${index} that ${whose} is ${JSON.stringify(token)} instead of ${JSON.stringify(right)}`);
    }
  };
  check('is stored', byIndex);
  check('its client got', received?.tokens.entries() ?? []);
  const isWrong = problems.length > numProblems;
  const last = stored.at(-1);
  const isStored = byIndex.size === expected.length && last?.finish_reason === 'length';
  if (!isStored)
    problems.push(`${byIndex.size} of ${expected.length} tokens are stored; the last: ${JSON.stringify(last)}`);
  const isReceived = received === undefined || hasAll(received, expected.length);
  if (!isReceived) {
    const { tokens, finishReason, numConnections, mistakes } = received;
    const end = `${finishReason ?? 'no end'} after ${numConnections} connections`;
    problems.push(
      `its client got ${tokens.length} of ${expected.length} tokens, ${end}; mistakes: ${mistakes.join('; ')}`,
    );
  }
  return { isLost: !isStored || !isReceived, numDoubled, isWrong, problems };
}

const hasAll = ({ tokens, finishReason, mistakes }: Received, numTokens: number): boolean =>
  tokens.length === numTokens && finishReason === 'length' && mistakes.length === 0;
