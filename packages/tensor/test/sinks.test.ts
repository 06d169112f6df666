/** Sinks against a softmax in float64 over all keys and one without a value, gathered and on the path of a single shard. */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { AttentionGather, applySinks } from '../src/attention-gather.ts';

const NUM_HEADS = 2;
const HEAD_DIM = 3;
/** |v| <= 1 and |score| <= 40: a log-sum-exp is off by 40 * 2^-24, a few roundings more. */
const BOUND = 2e-5;

interface Key {
  readonly score: number;
  readonly value: readonly number[];
  readonly shard: number;
}

function weightsOf(keys: readonly Key[], sink: number): { output: number[]; lse: number } {
  const maximum = Math.max(sink, ...keys.map((key) => key.score));
  const weights = keys.map((key) => Math.exp(key.score - maximum));
  const sum = weights.reduce((total, weight) => total + weight, Math.exp(sink - maximum));
  return {
    output: Array.from({ length: HEAD_DIM }, (_, d) =>
      keys.reduce((total, key, i) => total + (weights[i]! / sum) * key.value[d]!, 0),
    ),
    lse: maximum + Math.log(sum),
  };
}

/** A shard's partial: its own keys, no sink. */
const partialOf = (keys: readonly Key[]) => weightsOf(keys, Number.NEGATIVE_INFINITY);

const unit = fc.double({ min: -1, max: 1, noNaN: true });
const logit = fc.oneof(fc.double({ min: -40, max: 40, noNaN: true }), fc.constantFrom(-1e4, 1e4));
const key: fc.Arbitrary<Key> = fc.record({
  score: fc.double({ min: -40, max: 40, noNaN: true }),
  value: fc.array(unit, { minLength: HEAD_DIM, maxLength: HEAD_DIM }),
  shard: fc.nat(2),
});
const cells = fc.array(
  fc.array(fc.array(key, { minLength: 1, maxLength: 9 }), { minLength: NUM_HEADS, maxLength: NUM_HEADS }),
  { minLength: 1, maxLength: 4 },
);
const sinks = fc.array(logit, { minLength: NUM_HEADS, maxLength: NUM_HEADS });

function worstError(rows: readonly (readonly (readonly Key[])[])[], sinkLogits: readonly number[], got: Float32Array) {
  let worst = 0;
  rows.forEach((heads, row) => {
    heads.forEach((keys, head) => {
      const { output } = weightsOf(keys, sinkLogits[head]!);
      output.forEach((value, d) => {
        const error = Math.abs(got[(row * NUM_HEADS + head) * HEAD_DIM + d]! - value);
        if (!(error <= worst)) worst = error;
      });
    });
  });
  return worst;
}

test('a gather counts the sink of a head once, however the keys lie on shards', () => {
  fc.assert(
    fc.property(cells, sinks, (rows, sinkLogits) => {
      const gather = new AttentionGather(NUM_HEADS, HEAD_DIM);
      const output = new Float32Array(rows.length * NUM_HEADS * HEAD_DIM);
      gather.begin(output, rows.length);
      for (let shard = 0; shard < 3; shard++) {
        const partials = rows.flat().map((keys) => {
          const own = keys.filter((each) => each.shard === shard);
          return own.length === 0
            ? { output: new Array<number>(HEAD_DIM).fill(Number.NaN), lse: Number.NEGATIVE_INFINITY }
            : partialOf(own);
        });
        gather.add(
          Float32Array.from(partials.flatMap((partial) => partial.output)),
          Float32Array.from(partials.map((partial) => partial.lse)),
          Int32Array.from(rows.keys()),
        );
      }
      expect(gather.finish(sinkLogits)).toBe(-1);
      expect(worstError(rows, sinkLogits, output)).toBeLessThan(BOUND);
    }),
    { numRuns: 300 },
  );
});

test('the path of a single shard gives the same', () => {
  fc.assert(
    fc.property(cells, sinks, (rows, sinkLogits) => {
      const partials = rows.flat().map(partialOf);
      const output = Float32Array.from(partials.flatMap((partial) => partial.output));
      applySinks(output, Float32Array.from(partials.map((partial) => partial.lse)), sinkLogits);
      expect(worstError(rows, sinkLogits, output)).toBeLessThan(BOUND);
    }),
    { numRuns: 300 },
  );
});
