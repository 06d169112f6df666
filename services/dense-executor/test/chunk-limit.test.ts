/** Chunks beside decoding requests are as large as their steps may be long. */
import { describe, expect, it } from 'vitest';
import { ChunkLimit } from '../src/scheduling/chunk-limit.ts';

const decode = { numDecodeTokens: 8, numPromptTokens: 0, isDisturbed: false };

/** Steps beside a prompt whose tokens cost `tokenMs` each; decode steps take 60 ms. Returns the chunks. */
function run(subject: ChunkLimit, numSteps: number, tokenMs: (numDone: number) => number): number[] {
  let numDone = 0;
  return Array.from({ length: numSteps }, () => {
    const numPromptTokens = Math.min(128, subject.limit(8));
    const totalMs = 60 + numPromptTokens * tokenMs(numDone);
    subject.observe({ ...decode, numPromptTokens, totalMs });
    // The other wave waits too: this is no undisturbed step.
    subject.observe({ ...decode, isDisturbed: true, totalMs });
    numDone += numPromptTokens;
    return numPromptTokens;
  });
}

describe('ChunkLimit', () => {
  it('is none until steps with and without prompts were seen', () => {
    const subject = new ChunkLimit();
    expect(subject.limit(8)).toBe(Number.POSITIVE_INFINITY);
    subject.observe({ ...decode, numPromptTokens: 100, totalMs: 900 });
    subject.observe({ ...decode, totalMs: 60 });
    expect(subject.limit(8)).toBe(Number.POSITIVE_INFINITY);
    subject.observe({ ...decode, numPromptTokens: 100, totalMs: 960 });
    expect(subject.limit(8)).toBe(16);
  });

  it('is that of steps with about as many requests: what one request showed does not hold forty back', () => {
    const subject = new ChunkLimit();
    subject.observe({ numDecodeTokens: 1, numPromptTokens: 0, isDisturbed: false, totalMs: 5 });
    subject.observe({ numDecodeTokens: 1, numPromptTokens: 100, isDisturbed: false, totalMs: 25 });
    expect(subject.limit(1)).toBe(37);
    for (let i = 0; i < 9; i++)
      subject.observe({ numDecodeTokens: 40, numPromptTokens: 128, isDisturbed: true, totalMs: 65.6 });
    expect(subject.limit(40)).toBe(Number.POSITIVE_INFINITY);
    subject.observe({ numDecodeTokens: 36, numPromptTokens: 0, isDisturbed: false, totalMs: 40 });
    expect(subject.limit(40)).toBe(300);
  });

  it('keeps steps within 2.5 times the undisturbed ones while tokens become dearer', () => {
    const subject = new ChunkLimit();
    for (let i = 0; i < 20; i++) subject.observe({ ...decode, totalMs: 60 });
    const tokenMs = (numDone: number) => 0.5 + numDone / 2000;
    const chunks = run(subject, 60, tokenMs);
    let numDone = 0;
    for (const [i, numTokens] of chunks.entries()) {
      if (i > 1) expect(60 + numTokens * tokenMs(numDone)).toBeLessThan(60 * 2.8);
      numDone += numTokens;
    }
    expect(chunks[1]).toBe(128);
    expect(chunks.at(-1)).toBeLessThan(64);
  });

  it('lets prompts go on, however slow', () => {
    const subject = new ChunkLimit();
    subject.observe({ ...decode, totalMs: 60 });
    expect(run(subject, 5, () => 1e6).at(-1)).toBe(16);
  });

  it('is none where time is too short to be measured', () => {
    const subject = new ChunkLimit();
    for (const numPromptTokens of [0, 100]) subject.observe({ ...decode, numPromptTokens, totalMs: 0 });
    expect(subject.limit(8)).toBe(Number.POSITIVE_INFINITY);
  });

  it('grows again when tokens become cheaper', () => {
    const subject = new ChunkLimit();
    subject.observe({ ...decode, totalMs: 60 });
    expect(run(subject, 10, () => 3).at(-1)).toBe(30);
    expect(run(subject, 10, () => 0.5).at(-1)).toBe(128);
  });
});
