/** The attention of chunks to themselves: that of a plain float64 loop, in windows of any layer, one step after another. */
import { describe, expect, it } from 'vitest';
import { buildStep } from '../src/scheduling/step-builder.ts';
import { SelfAttention } from '../src/worker/self-attention.ts';
import { BLOCK, request } from './requests.ts';

const SPEC = { numLayers: 3, numHeads: 4, numKvHeads: 2, headDim: 8, scale: 0.3, windowTokens: [0, 5, 0] };

function random(length: number, seed: number): Float32Array {
  let state = seed;
  return Float32Array.from({ length }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    return state / 2 ** 31;
  });
}

/** o and log-sum-exp of one query row and head over rows [first, row] of the same chunk. */
function plain(
  { query, key, value }: Record<'query' | 'key' | 'value', Float32Array>,
  chunk: { first: number; row: number; head: number; window: number },
): { output: number[]; logSumExp: number } {
  const { numHeads, numKvHeads, headDim, scale } = SPEC;
  const kvHead = Math.floor(chunk.head / (numHeads / numKvHeads));
  const seen: { row: number; weight: number }[] = [];
  for (let row = chunk.first; row <= chunk.row; row++) {
    if (chunk.window > 0 && chunk.row - row >= chunk.window) continue;
    let score = 0;
    for (let d = 0; d < headDim; d++)
      score +=
        query[(chunk.row * numHeads + chunk.head) * headDim + d]! * key[(row * numKvHeads + kvHead) * headDim + d]!;
    seen.push({ row, weight: Math.exp(score * scale) });
  }
  const sum = seen.reduce((total, { weight }) => total + weight, 0);
  const output = Array.from({ length: headDim }, (_, d) =>
    seen.reduce(
      (total, { row, weight }) => total + (weight / sum) * value[(row * numKvHeads + kvHead) * headDim + d]!,
      0,
    ),
  );
  return { output, logSumExp: Math.log(sum) };
}

describe('SelfAttention', () => {
  it('is that of each chunk alone, layer by layer and step after step', async () => {
    const { numHeads, numKvHeads, headDim, windowTokens } = SPEC;
    const subject = new SelfAttention(SPEC, 1);
    for (const [stepId, kvDtype] of (['f32', 'f32', 'f16'] as const).entries()) {
      // Two chunks, the second after tokens that lie on shards; a decoding row between them stays out.
      const first = request({ numPromptTokens: 40 });
      const decoding = request({ numPromptTokens: 20, numComputed: 19, phase: 'decode' });
      const second = request({ numPromptTokens: 80, numComputed: 2 * BLOCK });
      const entries = [
        { request: first, start: 0, numTokens: 20 + stepId * 20, draft: [], kvGeneration: 0 },
        { request: decoding, start: 19, numTokens: 1, draft: [], kvGeneration: 0 },
        { request: second, start: 2 * BLOCK, numTokens: 17, draft: [], kvGeneration: 0 },
      ].map((entry) => ({ ...entry, numTokens: Math.min(entry.numTokens, 40) }));
      const shape = { blockSizeTokens: BLOCK, windowTokens: Number.POSITIVE_INFINITY, kvDtype };
      const { self, tokenIds } = buildStep(entries, shape, 0, stepId, 1).step;
      await subject.begin(self!);
      for (let layer = 0; layer < SPEC.numLayers; layer++) {
        const tensors = {
          query: random(tokenIds.length * numHeads * headDim, 3 + layer),
          key: random(tokenIds.length * numKvHeads * headDim, 5 + layer),
          value: random(tokenIds.length * numKvHeads * headDim, 7 + layer),
        };
        await subject.attend(layer, tensors.query, tensors.key, tensors.value);
        const numFirst = entries[0]!.numTokens;
        for (const [i, row] of subject.rows.entries()) {
          const from = row < numFirst ? 0 : numFirst + 1;
          for (let head = 0; head < numHeads; head++) {
            const want = plain(tensors, { first: from, row, head, window: windowTokens[layer]! });
            const at = (i * numHeads + head) * headDim;
            const tolerance = kvDtype === 'f32' ? 5 : 2;
            expect(subject.logSumExp[i * numHeads + head]).toBeCloseTo(want.logSumExp, tolerance);
            for (let d = 0; d < headDim; d++) expect(subject.output[at + d]).toBeCloseTo(want.output[d]!, tolerance);
          }
        }
      }
    }
    await subject.close();
  });

  it('that has no memory for a chunk says so, and takes the next one', async () => {
    const subject = new SelfAttention(SPEC, 1);
    const chunk = request({ numPromptTokens: 40 });
    const entries = [{ request: chunk, start: 0, numTokens: 40, draft: [], kvGeneration: 0 }];
    const shape = { blockSizeTokens: BLOCK, windowTokens: Number.POSITIVE_INFINITY, kvDtype: 'f32' as const };
    const self = buildStep(entries, shape, 0, 1, 1).step.self!;
    const refused = await subject.begin({ ...self, numBlocks: 2 ** 26 }).catch((cause: unknown) => cause);
    expect(refused).toMatchObject({
      code: 'overloaded',
      message: expect.stringContaining('LAMINA_MAX_BATCHED_TOKENS'),
    });
    await subject.begin(self);
    await subject.close();
  });
});
