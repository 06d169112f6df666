/**
 * Owns the figure that the native kernel exists for: bytes of KV per second in decode, over a bare read-and-sum of the
 * same bytes. Build first (`node build.mjs`, `npx tsc -b`), then `node bench/read-bandwidth.mjs [--mib 512] [--block 32]
 * [--simd avx2] [--dtype f16] [--rounds 5] [--context 4096] [--dims 64,128] [--groups 1,4,8] [--threads 1,2]`.
 *
 * Invariants
 * 1. Blocks of a request are scattered over the slab, as after a long uptime.
 * 2. Time runs from attend to done: the hop to the worker threads and back is part of the figure.
 * 3. Rounds of both sides alternate and the best of each counts, so that a noisy neighbour hits both.
 */
import { parseArgs } from 'node:util';
import { loadNativeAddon } from '../dist/native-addon.js';
import { NativeKernel } from '../dist/native-kernel.js';

const { values } = parseArgs({
  options: {
    mib: { type: 'string', default: '512' },
    block: { type: 'string', default: '32' },
    simd: { type: 'string', default: '' },
    dtype: { type: 'string', default: 'f16' },
    rounds: { type: 'string', default: '5' },
    context: { type: 'string', default: '4096' },
    dims: { type: 'string', default: '64,128' },
    groups: { type: 'string', default: '1,4,8' },
    threads: { type: 'string', default: '1,2' },
  },
});
const numbers = (list) => list.split(',').map(Number);
const loaded = loadNativeAddon();
if (loaded.addon === null) {
  console.log(loaded.reason);
  process.exit(1);
}
const blockSizeTokens = Number(values.block);
const contextTokens = Number(values.context);
const numKvHeads = 8;

function shuffled(count) {
  const order = Int32Array.from({ length: count }, (_, i) => i);
  let state = 12345;
  for (let i = count - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = state % (i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

function randomBytes(numFloats) {
  const floats = new Float32Array(numFloats);
  for (let i = 0; i < numFloats; i++) floats[i] = Math.random() - 0.5;
  return new Uint8Array(floats.buffer);
}

const attend = (kernel, step, qkv, out) =>
  new Promise((resolve, reject) => kernel.attend(step, 0, qkv, out, (error) => (error ? reject(error) : resolve())));

/** Writes every slot once, so that every page is really there. */
async function fill(kernel, headDim) {
  const rows = 2048;
  const numSlots = kernel.numBlocks * blockSizeTokens;
  const qkv = randomBytes(2 * rows * numKvHeads * headDim);
  for (let slot = 0; slot < numSlots; slot += rows) {
    const count = Math.min(rows, numSlots - slot);
    const step = kernel.beginStep({
      numQueryRows: 0,
      numKvRows: count,
      segments: new Int32Array(0),
      blocks: new Int32Array(0),
      kvSlots: Int32Array.from({ length: count }, (_, i) => slot + i),
    });
    await attend(kernel, step, qkv.subarray(0, 2 * count * numKvHeads * headDim * 4), new Uint8Array(0));
    kernel.endStep(step);
  }
}

/** One decode query per request, contexts of contextTokens. */
function decodePlan(numBlocks) {
  const order = shuffled(numBlocks);
  const perRequest = Math.min(numBlocks, Math.floor(contextTokens / blockSizeTokens));
  const numRequests = Math.floor(numBlocks / perRequest);
  const segments = new Int32Array(numRequests * 5);
  const blocks = new Int32Array(numRequests * perRequest * 3);
  for (let request = 0; request < numRequests; request++) {
    segments.set([request, 1, perRequest * blockSizeTokens - 1, request * perRequest, perRequest], request * 5);
    for (let i = 0; i < perRequest; i++) {
      const at = request * perRequest + i;
      blocks.set([order[at], i * blockSizeTokens, blockSizeTokens], at * 3);
    }
  }
  return { numQueryRows: numRequests, numKvRows: 0, segments, blocks, kvSlots: new Int32Array(0) };
}

for (const headDim of numbers(values.dims)) {
  for (const group of numbers(values.groups)) {
    for (const numThreads of numbers(values.threads)) {
      const numHeads = numKvHeads * group;
      const elementBytes = values.dtype === 'f16' ? 2 : 4;
      const bytesPerBlock = blockSizeTokens * numKvHeads * headDim * 2 * elementBytes;
      const numBlocks = Math.floor((Number(values.mib) * 2 ** 20) / bytesPerBlock);
      const spec = { numLayers: 1, numHeads, numKvHeads, headDim, scale: headDim ** -0.5 };
      const layout = { ...spec, blockSizeTokens, kvDtype: values.dtype };
      const kernel = new NativeKernel(loaded.addon, layout, numBlocks, numThreads, values.simd);
      await fill(kernel, headDim);
      const plan = decodePlan(numBlocks);
      const bytes = (plan.blocks.length / 3) * bytesPerBlock;
      const qkv = randomBytes(plan.numQueryRows * numHeads * headDim);
      const out = new Uint8Array(plan.numQueryRows * numHeads * (headDim + 1) * 4);
      const step = kernel.beginStep(plan);
      let bestRead = Number.POSITIVE_INFINITY;
      let bestAttend = Number.POSITIVE_INFINITY;
      for (let round = 0; round < Number(values.rounds); round++) {
        bestRead = Math.min(bestRead, kernel.measureBareRead(bytes, numThreads));
        const start = performance.now();
        await attend(kernel, step, qkv, out);
        bestAttend = Math.min(bestAttend, (performance.now() - start) / 1000);
      }
      kernel.endStep(step);
      await kernel.close();
      const read = bytes / bestRead / 1e9;
      const decode = bytes / bestAttend / 1e9;
      console.log(
        `${kernel.name} ${values.dtype} head_dim ${headDim} group ${group} threads ${numThreads}: ` +
          `decode ${decode.toFixed(1)} GB/s, bare read ${read.toFixed(1)} GB/s, ratio ${(decode / read).toFixed(2)}`,
      );
    }
  }
}
