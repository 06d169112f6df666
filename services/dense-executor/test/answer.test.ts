/** Answers: text without broken characters, stop strings, ends and usage. */
import { fileURLToPath } from 'node:url';
import { loadTokenizer, type Tokenizer } from '@lamina/model';
import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import { Answer } from '../src/request/answer.ts';
import { StopMatcher } from '../src/request/stop-matcher.ts';

let tokenizer: Tokenizer;
beforeAll(async () => {
  tokenizer = await loadTokenizer(fileURLToPath(new URL('../../../models/lamina-tiny', import.meta.url)));
});

const EOS = 0;

function answer(
  fields: { maxTokens?: number; stop?: string[]; ignoreEos?: boolean; logprobs?: number | null } = {},
): Answer {
  return new Answer({
    tokenizer,
    eosTokenIds: new Set([EOS]),
    item: { id: 'a', tokenIds: [5, 6, 7], maxTokens: 100, stop: [], logprobs: null, ignoreEos: false, ...fields },
  });
}

const sampled = (token: number) => ({ token, logprob: -0.5, topLogprobs: [] });

describe('StopMatcher', () => {
  it('holds back what may become a stop string and lets it go when it does not', () => {
    const matcher = new StopMatcher(['END']);
    expect(matcher.push('one E')).toEqual({ text: 'one ', isStopped: false });
    expect(matcher.push('N')).toEqual({ text: '', isStopped: false });
    expect(matcher.push('T')).toEqual({ text: 'ENT', isStopped: false });
    expect(matcher.push('x EN')).toEqual({ text: 'x ', isStopped: false });
    expect(matcher.push('D tail')).toEqual({ text: '', isStopped: true });
  });

  it('shows exactly the text before the earliest stop string, however the text is cut up', () => {
    const letters = fc.constantFrom('a', 'b', 'c');
    fc.assert(
      fc.property(
        fc.array(fc.string({ unit: letters, maxLength: 4 }), { maxLength: 12 }),
        fc.array(fc.string({ unit: letters, minLength: 1, maxLength: 4 }), { minLength: 1, maxLength: 3 }),
        (parts, stops) => {
          const matcher = new StopMatcher(stops);
          let shown = '';
          let isStopped = false;
          for (const part of parts) {
            const match = matcher.push(part);
            shown += match.text;
            isStopped = match.isStopped;
            if (isStopped) break;
          }
          if (!isStopped) shown += matcher.finish();
          const whole = parts.join('');
          const found = stops.map((stop) => whole.indexOf(stop)).filter((at) => at >= 0);
          // A stop string is acted on as soon as it is complete, so a longer one that began earlier may come too late.
          if (found.length === 0) expect(shown).toBe(whole);
          else {
            expect(isStopped).toBe(true);
            expect(whole.startsWith(shown)).toBe(true);
            expect(stops.some((stop) => whole.startsWith(stop, shown.length))).toBe(true);
            expect(stops.some((stop) => shown.includes(stop))).toBe(false);
          }
        },
      ),
      { numRuns: 3_000 },
    );
  });
});

describe('Answer', () => {
  it('joins to the text of its tokens and ends with usage', () => {
    const text = 'Once upon a time there was a café 😀 on the hill.';
    const tokens = tokenizer.encode(text);
    const subject = answer({ maxTokens: tokens.length });
    const messages = tokens.map((token) => subject.push(sampled(token)));
    expect(messages.map((message) => message.text).join('')).toBe(text);
    expect(messages.every((message) => !message.text.includes('\uFFFD'))).toBe(true);
    expect(messages.map((message) => message.index)).toEqual(tokens.map((_, index) => index));
    expect(
      messages.slice(0, -1).every((message) => message.finish_reason === null && message.usage === undefined),
    ).toBe(true);
    expect(messages.at(-1)).toMatchObject({
      finish_reason: 'length',
      usage: { prompt_tokens: 3, completion_tokens: tokens.length, total_tokens: 3 + tokens.length },
    });
  });

  it('stops at the end-of-text token unless told to ignore it', () => {
    expect(answer().push(sampled(EOS))).toMatchObject({ token: EOS, text: '', finish_reason: 'stop' });
    expect(answer({ ignoreEos: true }).push(sampled(EOS))).toMatchObject({ token: EOS, text: '', finish_reason: null });
  });

  it('cuts the text before a stop string that spans tokens', () => {
    const subject = answer({ stop: ['time there'] });
    const texts: string[] = [];
    let reason: string | null = null;
    for (const token of tokenizer.encode('Once upon a time there was')) {
      const message = subject.push(sampled(token));
      texts.push(message.text);
      reason = message.finish_reason;
      if (reason !== null) break;
    }
    expect(texts.join('')).toBe('Once upon a ');
    expect(reason).toBe('stop');
  });

  it('shows held-back text when it ends otherwise', () => {
    const subject = answer({ stop: ['time flies'] });
    let shown = '';
    for (const token of tokenizer.encode('Once upon a time')) shown += subject.push(sampled(token)).text;
    const end = subject.end('cancelled');
    expect(shown + end.text).toBe('Once upon a time');
    expect(end).toMatchObject({ token: null, finish_reason: 'cancelled' });
  });

  it('replaces an incomplete character at the end', () => {
    const [first] = tokenizer.encode('😀');
    const subject = answer({ maxTokens: 1 });
    expect(subject.push(sampled(first!)).text).toBe('\uFFFD');
  });

  it('carries log-probabilities only where they were asked for', () => {
    expect(answer().push(sampled(40))).not.toHaveProperty('logprob');
    expect(answer({ logprobs: 0 }).push(sampled(40))).toMatchObject({ logprob: -0.5 });
    const message = answer({ logprobs: 1 }).push({
      token: 40,
      logprob: -0.5,
      topLogprobs: [{ token: 40, logprob: -0.5 }],
    });
    expect(message.top_logprobs).toEqual([
      {
        token: 40,
        text: tokenizer.tokenBytes(40).length > 0 ? new TextDecoder().decode(tokenizer.tokenBytes(40)) : '',
        logprob: -0.5,
      },
    ]);
  });
});
