/**
 * Owns timing ONNX Runtime's GroupQueryAttention alone: `group-query-attention.js headDim group threads context rounds`
 * prints millions of (token, KV head) per second, of one query per request.
 */
import { encodeModelOf, type OnnxGraph } from '@lamina/model';
import { InferenceSession, Tensor } from 'onnxruntime-node';

const NUM_REQUESTS = 8;
const NUM_KV_HEADS = 8;
const FLOAT32 = 1;
const INT32 = 6;
const INT_ATTRIBUTE = 2;

const [headDim = 64, group = 1, threads = 1, contextTokens = 4096, rounds = 3] = process.argv.slice(2).map(Number);
const numHeads = NUM_KV_HEADS * group;

const value = (name: string, elemType: number, dims: readonly (string | number)[]) => ({
  name,
  type: {
    tensorType: {
      elemType,
      shape: { dim: dims.map((dim) => (typeof dim === 'string' ? { dimParam: dim } : { dimValue: dim })) },
    },
  },
});

const cacheDims = ['batch', NUM_KV_HEADS, 'past', headDim];
const graph: OnnxGraph = {
  name: 'attention',
  node: [
    {
      opType: 'GroupQueryAttention',
      domain: 'com.microsoft',
      name: 'attention',
      input: ['query', 'key', 'value', 'past_key', 'past_value', 'seqlens_k', 'total'],
      output: ['out', 'present_key', 'present_value'],
      attribute: [
        { name: 'num_heads', type: INT_ATTRIBUTE, i: numHeads },
        { name: 'kv_num_heads', type: INT_ATTRIBUTE, i: NUM_KV_HEADS },
      ],
    },
  ],
  input: [
    value('query', FLOAT32, ['batch', 1, numHeads * headDim]),
    value('key', FLOAT32, ['batch', 1, NUM_KV_HEADS * headDim]),
    value('value', FLOAT32, ['batch', 1, NUM_KV_HEADS * headDim]),
    value('past_key', FLOAT32, cacheDims),
    value('past_value', FLOAT32, cacheDims),
    value('seqlens_k', INT32, ['batch']),
    value('total', INT32, []),
  ],
  output: [
    value('out', FLOAT32, ['batch', 1, numHeads * headDim]),
    value('present_key', FLOAT32, ['batch', NUM_KV_HEADS, 'present', headDim]),
    value('present_value', FLOAT32, ['batch', NUM_KV_HEADS, 'present', headDim]),
  ],
};

const floats = (dims: readonly number[]): Tensor => {
  const count = dims.reduce((product, dim) => product * dim, 1);
  return new Tensor(
    'float32',
    Float32Array.from({ length: count }, () => Math.random() - 0.5),
    dims,
  );
};

const session = await InferenceSession.create(
  encodeModelOf(graph, 8, [
    { domain: '', version: 17 },
    { domain: 'com.microsoft', version: 1 },
  ]),
  { intraOpNumThreads: threads, interOpNumThreads: 1, enableMemPattern: false },
);

/** The newest token is given as key and value; `pastTokens` is the size of the cache's memory. */
function feedsOf(pastTokens: number): Record<string, Tensor> {
  return {
    query: floats([NUM_REQUESTS, 1, numHeads * headDim]),
    key: floats([NUM_REQUESTS, 1, NUM_KV_HEADS * headDim]),
    value: floats([NUM_REQUESTS, 1, NUM_KV_HEADS * headDim]),
    past_key: floats([NUM_REQUESTS, NUM_KV_HEADS, pastTokens, headDim]),
    past_value: floats([NUM_REQUESTS, NUM_KV_HEADS, pastTokens, headDim]),
    seqlens_k: new Tensor('int32', new Int32Array(NUM_REQUESTS).fill(contextTokens - 1), [NUM_REQUESTS]),
    total: new Tensor('int32', Int32Array.of(contextTokens), []),
  };
}

/** Seconds of the fastest of `rounds` runs after one to warm up. */
async function fastest(run: () => Promise<InferenceSession.ReturnType>): Promise<number> {
  let best = Number.POSITIVE_INFINITY;
  for (let round = 0; round <= rounds; round++) {
    const startedMs = performance.now();
    const { out } = await run();
    const seconds = (performance.now() - startedMs) / 1000;
    if (!(out?.data instanceof Float32Array) || !out.data.every(Number.isFinite))
      throw new Error('no attention came out');
    if (round > 0) best = Math.min(best, seconds);
  }
  return best;
}

const copying = feedsOf(contextTokens - 1);
const copied = await fastest(() => session.run(copying));
const inPlace = feedsOf(contextTokens);
const fetches = {
  out: floats([NUM_REQUESTS, 1, numHeads * headDim]),
  present_key: inPlace.past_key!,
  present_value: inPlace.past_value!,
};
const appended = await fastest(() => session.run(inPlace, fetches));
const units = NUM_REQUESTS * NUM_KV_HEADS * contextTokens;
process.stdout.write(`${(units / Math.min(copied, appended) / 1e6).toFixed(3)}\n`);
