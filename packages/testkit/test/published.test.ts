/**
 * Published ONNX decoders, uncut against cut: the graph as ONNX Runtime runs it, cache and all, against its stages with
 * plain TypeScript attention between them. Bounds are in published-forms.ts; what was seen is logged.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type BuiltModel, buildModel } from '@lamina/model';
import { argmax, type GreedyResult, StagedReference, UncutReference, writeExport } from '@lamina/testkit';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { PUBLISHED_FORMS } from './published-forms.ts';

const NUM_GREEDY = 64;
const dir = mkdtempSync(join(tmpdir(), 'lamina-published-'));
afterAll(() => rmSync(dir, { recursive: true, force: true }));

const someTokens = (length: number, seed: number): number[] =>
  Array.from({ length }, (_, i) => (i * 37 + seed * 91 + i * i * 3) % 256);

function worstOf(found: readonly Float32Array[], expected: readonly Float32Array[]): number {
  let worst = 0;
  expect(found.length).toBe(expected.length);
  for (const [row, logits] of expected.entries()) {
    for (const [i, logit] of logits.entries()) {
      // NaN stays NaN.
      worst = Math.max(worst, Math.abs(logit - found[row]![i]!));
    }
  }
  return worst;
}

describe.each(PUBLISHED_FORMS)('$name', ({ name, form, options, bound, waveBound }) => {
  let built: BuiltModel;
  let uncut: UncutReference;
  let staged: StagedReference;
  let greedy: GreedyResult;
  const prompt = someTokens(17, 1);

  beforeAll(async () => {
    const model = join(dir, name.replaceAll(/\W+/g, '-'));
    await writeExport(model, form, options);
    built = await buildModel(model, { cacheDir: join(dir, 'cache') });
    [uncut, staged] = [await UncutReference.load(built), await StagedReference.load(built)];
    greedy = await uncut.greedy(prompt, NUM_GREEDY, { ignoreEos: true });
  });
  afterAll(async () => {
    await uncut.release();
    await staged.release();
  });

  it('gives the logits of the uncut graph in ragged waves of prefill and decode', async () => {
    const sequences = [someTokens(17, 2), someTokens(5, 3), someTokens(29, 4)];
    const expected: Float32Array[][] = [];
    for (const tokens of sequences) expected.push(await uncut.logits(tokens));
    const running = sequences.map(() => staged.newSequence());
    const found: Float32Array[][] = sequences.map(() => []);
    // How many tokens of each sequence each wave takes: 0 = not in it.
    const waves = [
      [9, 2, 0],
      [0, 1, 20],
      [7, 1, 1],
      [1, 1, 8],
    ];
    for (const counts of waves) {
      const wave = counts.flatMap((count, i) => {
        const start = running[i]!.numTokens;
        return count === 0 ? [] : [{ i, sequence: running[i]!, tokenIds: sequences[i]!.slice(start, start + count) }];
      });
      const rows = await staged.runWave(wave);
      for (const { i, tokenIds } of wave) found[i]!.push(...rows.splice(0, tokenIds.length));
    }
    const worst = Math.max(...found.map((rows, i) => worstOf(rows, expected[i]!)));
    console.log(`${name}: worst logit difference ${worst.toExponential(1)}`);
    expect(worst).toBeLessThan(bound);
  });

  it('chooses its tokens greedily, 64 of them', async () => {
    const sequence = staged.newSequence();
    let [row] = await staged.runWave([{ sequence, tokenIds: prompt }], [prompt.length - 1]);
    let numOther = 0;
    for (const [step, token] of greedy.tokenIds.entries()) {
      const own = argmax(row!);
      const logits = greedy.logits[step]!;
      // A token that differs must be one that the uncut graph cannot tell from its own within the bound.
      if (own !== token) {
        expect(logits[token]! - logits[own]!).toBeLessThan(2 * bound);
        numOther++;
      }
      [row] = await staged.runWave([{ sequence, tokenIds: [token] }]);
    }
    if (bound < 1e-3) expect(numOther).toBe(0);
    else console.log(`${name}: ${numOther} of ${NUM_GREEDY} tokens are ties within the bound`);
  });

  it('gives 8 requests of different lengths in one wave what each gets alone', async () => {
    const prompts = [1, 2, 3, 5, 8, 13, 21, 34].map((length, seed) => someTokens(length, seed));
    const together = prompts.map(() => staged.newSequence());
    const alone = prompts.map(() => staged.newSequence());
    let pending = prompts;
    let worst = 0;
    for (let step = 0; step < 4; step++) {
      const ends = pending.map((_, i) => pending.slice(0, i + 1).reduce((sum, tokens) => sum + tokens.length, 0) - 1);
      const rows = await staged.runWave(
        pending.map((tokenIds, i) => ({ sequence: together[i]!, tokenIds })),
        ends,
      );
      for (const [i, tokenIds] of pending.entries()) {
        const own = await staged.runWave([{ sequence: alone[i]!, tokenIds }], [tokenIds.length - 1]);
        worst = Math.max(worst, worstOf([rows[i]!], own));
      }
      pending = rows.map((row) => [argmax(row)]);
    }
    console.log(`${name}: worst difference in a wave of 8 ${worst.toExponential(1)}`);
    expect(worst).toBeLessThan(waveBound);
  });
});
