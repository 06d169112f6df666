/**
 * Owns the attention kernel without anything around it, as what shards under a quota are compared with: one process that
 * attends to its share of the blocks again and again, with no bus, no frames and nobody to wait for.
 *
 * `kernel-alone.js numShards numLayers` writes KV, prints a line, and then a byte for every layer that is done.
 */
import { createKernel, type KernelStep } from '@lamina/attention-kernel';
import { BLOCK_FIELDS, SEGMENT_FIELDS, type StepPlan } from '@lamina/tensor';
import { SCALE, scaleLayoutOf } from './scale-shape.ts';

const [numShards = 1, numLayers = 1] = process.argv.slice(2).map(Number);
const layout = scaleLayoutOf(numLayers);
const { blockSizeTokens, numHeads, numKvHeads, headDim } = layout;
const blocksPerRequest = SCALE.contextTokens / blockSizeTokens / numShards;
const numBlocks = blocksPerRequest * SCALE.numRequests;
const HALF_BYTES = 2;
const FILL_ROWS = 512;

const { kernel } = createKernel({ layout, numBlocks, numThreads: 1, kind: 'native' });
const none = new Int32Array(0);
/** Halves of 0.25 to 0.5 and less: any will do, as long as they are numbers. */
const random = (bytes: number): Uint8Array =>
  Uint8Array.from({ length: bytes }, (_, i) => (i % 2 === 0 ? Math.random() * 256 : 0x34 + Math.random() * 4));
const attend = (step: KernelStep, layer: number, qkv: Uint8Array, out: Uint8Array): Promise<void> =>
  new Promise((resolve, reject) => {
    kernel.attend(step, layer, qkv, out, (error) => (error === null ? resolve() : reject(error)));
  });

const rows = random(2 * FILL_ROWS * numKvHeads * headDim * HALF_BYTES);
for (let slot = 0; slot < numBlocks * blockSizeTokens; slot += FILL_ROWS) {
  const kvSlots = Int32Array.from({ length: FILL_ROWS }, (_, i) => slot + i);
  const step = kernel.beginStep({ numQueryRows: 0, numKvRows: FILL_ROWS, segments: none, blocks: none, kvSlots });
  for (let layer = 0; layer < numLayers; layer++) await attend(step, layer, rows, new Uint8Array(0));
  kernel.endStep(step);
}

const segments = new Int32Array(SCALE.numRequests * SEGMENT_FIELDS);
const blocks = new Int32Array(numBlocks * BLOCK_FIELDS);
for (let request = 0; request < SCALE.numRequests; request++) {
  const first = request * blocksPerRequest;
  segments.set([request, 1, SCALE.contextTokens - 1, first, blocksPerRequest], request * SEGMENT_FIELDS);
  for (let i = 0; i < blocksPerRequest; i++)
    blocks.set([first + i, i * numShards * blockSizeTokens, blockSizeTokens], (first + i) * BLOCK_FIELDS);
}
const plan: StepPlan = { numQueryRows: SCALE.numRequests, numKvRows: 0, segments, blocks, kvSlots: none };
const step = kernel.beginStep(plan);
const queries = random(SCALE.numRequests * numHeads * headDim * HALF_BYTES);
const out = new Uint8Array(SCALE.numRequests * numHeads * (headDim * HALF_BYTES + Float32Array.BYTES_PER_ELEMENT));
process.stdout.write('\n');
for (let layer = 0; ; layer = (layer + 1) % numLayers) {
  await attend(step, layer, queries, out);
  process.stdout.write('.');
}
