/** Drafts from the context: what is guessed, how much of a step they may take, and what their verification leaves behind. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { PromptLookup } from '../src/scheduling/prompt-lookup.ts';
import { Scheduler } from '../src/scheduling/scheduler.ts';
import { NOT_WANTED, type StepRequest } from '../src/worker/messages.ts';
import { Bench, BLOCK, ScriptedKv, settle } from './executor-bench.ts';
import { request } from './requests.ts';

const PHRASE = [11, 12, 13, 14, 15, 16, 17, 18];

function scheduler(maxBatchedTokens = 64): Scheduler {
  const made = new Scheduler({ maxBatchedTokens, prefillChunkTokens: 32, speculation: 'auto' }, 1, 1);
  made.blockSizeTokens = BLOCK;
  return made;
}

/** A decoding request whose text repeats PHRASE. */
function repeating(options: { numTokens?: number; maxTokens?: number; numBlocks?: number } = {}) {
  const { numTokens = 32, numBlocks = 6, ...rest } = options;
  const made = request({ numPromptTokens: numTokens, numComputed: numTokens - 1, phase: 'decode', numBlocks, ...rest });
  for (let i = 0; i < numTokens; i++) made.tokens[i] = PHRASE[i % PHRASE.length]!;
  return made;
}

describe('PromptLookup', () => {
  it('continues as the text did where its last tokens stood before', () => {
    expect(new PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4]).draft(4)).toEqual([5, 6, 7, 8]);
    expect(new PromptLookup([1, 2, 3, 4, 5, 6]).draft(4)).toEqual([]);
  });

  it('takes the last occurrence, and a short sequence only when no long one is known', () => {
    expect(new PromptLookup([7, 8, 20, 21, 22, 23, 7, 8, 30, 31, 32, 33, 7, 8]).draft(2)).toEqual([30, 31]);
    expect(new PromptLookup([1, 2, 7, 8, 20, 21, 3, 7, 8, 30, 31, 1, 2, 7, 8]).draft(2)).toEqual([20, 21]);
  });

  it('goes on with what it drafted when the text repeats itself up to its end', () => {
    expect(new PromptLookup([1, 2, 3, 1, 2, 3]).draft(4)).toEqual([1, 2, 3, 1]);
  });

  it('finds what was appended since', () => {
    const tokens = [1, 2, 3, 4];
    const lookup = new PromptLookup(tokens);
    expect(lookup.draft(2)).toEqual([]);
    tokens.push(50, 60, 2, 3);
    expect(lookup.draft(2)).toEqual([4, 50]);
  });

  /** Lengths of the next drafts, of each of which at most `numRight` tokens are accepted. */
  function draftLengths(lookup: PromptLookup, numSteps: number, numRight: number): number[] {
    return Array.from({ length: numSteps }, () => {
      const { length } = lookup.draft(99);
      if (length > 0) lookup.verified(length, Math.min(length, numRight));
      return length;
    });
  }

  const repeatingLookup = (): PromptLookup =>
    new PromptLookup(Array.from({ length: 100 }, (_, i) => PHRASE[i % PHRASE.length]!));

  it('drafts as much as what was accepted lately pays for', () => {
    const lookup = repeatingLookup();
    expect(draftLengths(lookup, 3, 99)).toEqual([4, 12, 15]);
    const afterTwoEach = draftLengths(lookup, 40, 2).at(-1)!;
    expect(afterTwoEach).toBeGreaterThanOrEqual(2);
    expect(afterTwoEach).toBeLessThanOrEqual(5);
    expect(draftLengths(lookup, 20, 99).at(-1)).toBe(15);
  });

  it('drafts one token in sixteen steps once none is accepted, and finds out when that changes', () => {
    const lookup = repeatingLookup();
    const lengths = draftLengths(lookup, 200, 0);
    const firstPause = lengths.indexOf(0);
    expect(firstPause).toBeLessThan(20);
    expect(lengths.slice(firstPause).reduce((sum, length) => sum + length, 0)).toBeLessThanOrEqual(200 / 16);
    const probes = lengths.flatMap((length, i) => (i > firstPause && length > 0 ? [i] : []));
    expect(probes.slice(1).every((at, i) => at - probes[i]! === 16)).toBe(true);
    expect(draftLengths(lookup, 40, 99).at(-1)).toBe(15);
  });

  it('drafts less beside the rows of others, which a longer step would hold up', () => {
    const lengths = [0, 1, 3, 7].map((numOthers) => repeatingLookup().draft(99, numOthers).length);
    expect(lengths).toEqual(lengths.toSorted((a, b) => b - a));
    expect(lengths[3]).toBeLessThan(lengths[0]!);
  });

  it('only ever drafts tokens of the text, and no more than the limit', () => {
    fc.assert(
      fc.property(fc.array(fc.nat(3), { maxLength: 80 }), fc.nat(20), (tokens, limit) => {
        const draft = new PromptLookup(tokens).draft(limit);
        expect(draft.length).toBeLessThanOrEqual(limit);
        for (const token of draft) expect(tokens).toContain(token);
      }),
    );
  });
});

describe('a step with drafts', () => {
  it('fills up to 16 rows, the same for every request, and none in a full batch', () => {
    const draftLengths = (numRequests: number): number[] => {
      const subject = scheduler();
      for (let i = 0; i < numRequests; i++) {
        const made = repeating();
        made.lookup = new PromptLookup(made.tokens);
        made.lookup.verified(15, 15);
        made.lookup.verified(15, 15);
        subject.add(made);
      }
      return subject.formStep(0).map((entry) => entry.draft.length);
    };
    expect(draftLengths(1)).toEqual([15]);
    expect(draftLengths(3)).toEqual([4, 4, 4]);
    expect(draftLengths(8)).toEqual(Array.from({ length: 8 }, () => 1));
    expect(draftLengths(16)).toEqual(Array.from({ length: 16 }, () => 0));
  });

  it('drafts no further than the blocks, the budget, the answer and the short rotary table reach', () => {
    const draftOf = (made: ReturnType<typeof repeating>, subject = scheduler()): number => {
      subject.add(made);
      return subject.formStep(0)[0]!.draft.length;
    };
    expect(draftOf(repeating())).toBe(4);
    expect(draftOf(repeating({ numTokens: 30, numBlocks: 2 }))).toBe(2);
    expect(draftOf(repeating({ maxTokens: 3 }))).toBe(2);
    expect(draftOf(repeating(), scheduler(2))).toBe(1);
    const withShortTable = (): Scheduler => {
      const subject = scheduler();
      subject.shortSequences = { numTokens: 33, offset: 1000 };
      return subject;
    };
    expect(draftOf(repeating(), withShortTable())).toBe(1);
    expect(draftOf(repeating({ numTokens: 34 }), withShortTable())).toBe(4);
  });
});

describe('verification', () => {
  /** A request that has its first token and the drafted step after it in flight. */
  async function drafted(maxTokens = 20): Promise<{ bench: Bench; step: StepRequest }> {
    const kv = new ScriptedKv();
    const bench = new Bench(kv, 'auto');
    bench.admit({ id: 'r', maxTokens, tokenIds: Array.from({ length: 32 }, (_, i) => PHRASE[i % PHRASE.length]!) });
    kv.next().give(8);
    await settle();
    bench.finish(0, [PHRASE[0]!]);
    return { bench, step: bench.steps.get(0)! };
  }

  it('keeps the tokens that agree and the one after them', async () => {
    const { bench, step } = await drafted();
    expect([...step.tokenIds].map(Number)).toEqual([11, 12, 13, 14, 15]);
    bench.finish(0, [12, 13, 99, NOT_WANTED, NOT_WANTED]);
    expect(bench.request('r').tokens.slice(32)).toEqual([11, 12, 13, 99]);
    expect(bench.request('r').numComputed).toBe(35);
    // The next step begins with the token that replaced the wrong draft.
    expect([...bench.steps.get(0)!.positionIds.subarray(0, 1)].map(Number)).toEqual([35]);
    await settle();
    expect(bench.messages.map((message) => message.token)).toEqual([11, 12, 13, 99]);
    expect(bench.messages.map((message) => message.index)).toEqual([0, 1, 2, 3]);
  });

  it('ends with the token that ends the answer', async () => {
    const { bench } = await drafted(3);
    bench.finish(0, [12, 13]);
    await settle();
    expect(bench.messages.map((message) => message.token)).toEqual([11, 12, 13]);
    expect(bench.messages.at(-1)?.finish_reason).toBe('length');
    expect(bench.completed).toEqual(['r']);
  });

  it('fails the request, and only it, when a verified row is not finite', async () => {
    const { bench } = await drafted();
    bench.finish(0, [12, -1, NOT_WANTED, NOT_WANTED, NOT_WANTED]);
    await settle();
    expect(bench.messages.map((message) => message.token)).toEqual([11, 12, null]);
    expect(bench.messages.at(-1)?.error?.code).toBe('numeric_error');
  });
});
