/**
 * Owns the figure that the native kernel exists for: bytes of KV per second in decode, over a bare read-and-sum of the
 * same bytes. Build first (`node deploy/native-addons.mjs`, `npx tsc -b`), then `node bench/read-bandwidth.mjs [--mib 512] [--block 32]
 * [--simd avx2] [--dtype f16] [--rounds 5] [--context 4096] [--dims 64,128] [--groups 1,4,8] [--threads 1,2]
 * [--prefill 512] [--json]`. With --prefill, instead: the multiply-adds per second of a chunk of that many queries at the
 * end of one context, over those of registers alone. --json prints an array of rows and nothing else.
 *
 * Invariants
 * 1. Blocks of a request are scattered over the slab, as after a long uptime.
 * 2. Time runs from attend to done: the hop to the worker threads and back is part of the figure.
 * 3. Rounds of both sides alternate, so that a noisy neighbour hits both. `ratio` is that of the best rounds,
 *    `ratioMedian` the median of the rounds' own ratios.
 */
import { parseArgs } from 'node:util';
import { loadNativeAddon } from '../dist/native-addon.js';
import { NativeKernel } from '../dist/native-kernel.js';
import { vectorOps } from '../dist/vector-ops.js';

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
    prefill: { type: 'string', default: '0' },
    json: { type: 'boolean', default: false },
  },
});
const numbers = (list) => list.split(',').map(Number);
const loaded = loadNativeAddon();
if (loaded.addon === null) {
  console.error(loaded.reason);
  process.exit(1);
}
const blockSizeTokens = Number(values.block);
const contextTokens = Number(values.context);
const numKvHeads = 8;
const elementBytes = values.dtype === 'f16' ? 2 : 4;

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

function randomBytes(count) {
  const floats = Float32Array.from({ length: count }, () => Math.random() - 0.5);
  if (values.dtype === 'f32') return new Uint8Array(floats.buffer);
  const halves = new Uint16Array(count);
  vectorOps().toHalves(floats, 0, count, halves, 0);
  return new Uint8Array(halves.buffer);
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
    await attend(kernel, step, qkv.subarray(0, 2 * count * numKvHeads * headDim * elementBytes), new Uint8Array(0));
    kernel.endStep(step);
  }
}

/** The last numQueries positions of every request, contexts of contextTokens. */
function planOf(numBlocks, maxRequests, numQueries) {
  const order = shuffled(numBlocks);
  const perRequest = Math.min(numBlocks, Math.floor(contextTokens / blockSizeTokens));
  const numRequests = Math.min(maxRequests, Math.floor(numBlocks / perRequest));
  const segments = new Int32Array(numRequests * 5);
  const blocks = new Int32Array(numRequests * perRequest * 3);
  for (let request = 0; request < numRequests; request++) {
    const firstPosition = perRequest * blockSizeTokens - numQueries;
    segments.set([request * numQueries, numQueries, firstPosition, request * perRequest, perRequest], request * 5);
    for (let i = 0; i < perRequest; i++) {
      const at = request * perRequest + i;
      blocks.set([order[at], i * blockSizeTokens, blockSizeTokens], at * 3);
    }
  }
  const numQueryRows = numRequests * numQueries;
  return { numQueryRows, numKvRows: 0, segments, blocks, kvSlots: new Int32Array(0) };
}

const median = (list) => list.sort((a, b) => a - b)[Math.floor(list.length / 2)];

/** Alternates attend and its yardstick, both in work per second; `work` is what one attend does. */
async function compare(kernel, plan, work, yardstick) {
  const { numHeads, headDim } = kernel.layout;
  const qkv = randomBytes(plan.numQueryRows * numHeads * headDim);
  const out = new Uint8Array(plan.numQueryRows * numHeads * (headDim * elementBytes + 4));
  const step = kernel.beginStep(plan);
  const ours = [];
  const theirs = [];
  for (let round = 0; round < Number(values.rounds); round++) {
    theirs.push(yardstick());
    const start = performance.now();
    await attend(kernel, step, qkv, out);
    ours.push((work * 1000) / (performance.now() - start));
  }
  kernel.endStep(step);
  return {
    ours: Math.max(...ours),
    yardstick: Math.max(...theirs),
    ratio: Math.max(...ours) / Math.max(...theirs),
    ratioMedian: median(ours.map((value, i) => value / theirs[i])),
  };
}

const prefillQueries = Math.min(Number(values.prefill), Math.floor(contextTokens / blockSizeTokens) * blockSizeTokens);
const rows = [];
for (const headDim of numbers(values.dims)) {
  for (const group of numbers(values.groups)) {
    for (const numThreads of numbers(values.threads)) {
      const numHeads = numKvHeads * group;
      const bytesPerBlock = blockSizeTokens * numKvHeads * headDim * 2 * elementBytes;
      const numBlocks = Math.floor((Number(values.mib) * 2 ** 20) / bytesPerBlock);
      const spec = { numLayers: 1, numHeads, numKvHeads, headDim, scale: headDim ** -0.5 };
      const layout = { ...spec, blockSizeTokens, kvDtype: values.dtype };
      const kernel = new NativeKernel(loaded.addon, layout, numBlocks, numThreads, values.simd);
      await fill(kernel, headDim);
      const what = { kernel: kernel.name, dtype: values.dtype, headDim, group, threads: numThreads };
      let row;
      if (prefillQueries > 0) {
        const plan = planOf(numBlocks, 1, prefillQueries);
        const numKeys = (plan.blocks.length / 3) * blockSizeTokens;
        const numPairs = prefillQueries * (numKeys - (prefillQueries - 1) / 2);
        const peak = () => kernel.measurePeakFlops() * numThreads;
        const figures = await compare(kernel, plan, 4 * numPairs * numHeads * headDim, peak);
        row = { part: 'prefill', unit: 'GFLOP/s', ...what, ...figures };
      } else {
        const plan = planOf(numBlocks, Number.POSITIVE_INFINITY, 1);
        const bytes = (plan.blocks.length / 3) * bytesPerBlock;
        const read = () => bytes / kernel.measureBareRead(bytes, numThreads);
        row = { part: 'decode', unit: 'GB/s', ...what, ...(await compare(kernel, plan, bytes, read)) };
      }
      await kernel.close();
      row.ours /= 1e9;
      row.yardstick /= 1e9;
      rows.push(row);
      if (values.json) continue;
      console.log(
        `${row.kernel} ${row.dtype} head_dim ${headDim} group ${group} threads ${numThreads}: ` +
          `${row.part} ${row.ours.toFixed(1)} ${row.unit}, ${row.part === 'decode' ? 'bare read' : 'peak'} ` +
          `${row.yardstick.toFixed(1)} ${row.unit}, ratio ${row.ratio.toFixed(2)}, median ${row.ratioMedian.toFixed(2)}`,
      );
    }
  }
}
if (values.json) console.log(JSON.stringify(rows, null, 2));
