/**
 * Owns the simulated life of several requests on one shard: appends over many steps, blocks with holes (the rest of a
 * request lives on other shards), decode and prefill mixed, and the comparison of every output with the oracle.
 *
 * Invariants
 * 1. A request's blocks here are scattered over the slab in random order.
 * 2. K and V come from the request's seed, so every kernel sees the same numbers.
 */
import type { KvLayout, StepPlan } from '@lamina/tensor';
import type { AttentionKernel } from '../src/kernel.ts';
import {
  attend,
  type Comparison,
  compareRow,
  type History,
  oracleRow,
  outBytes,
  outFloats,
  Random,
  stored,
  toBytes,
  unaligned,
} from './support.ts';

interface Request {
  numTokens: number;
  /** Logical block -> physical block, or null where the block lives on another shard. */
  readonly blockTable: (number | null)[];
  readonly history: History;
}

export interface ScenarioOptions {
  readonly seed: number;
  readonly layout: KvLayout;
  readonly numBlocks: number;
  readonly numSteps: number;
  readonly maxChunkTokens: number;
  readonly numRequests: number;
  /** Share of blocks that live elsewhere. */
  readonly holes: number;
  readonly amplitude: number;
}

interface StepCase {
  readonly plan: StepPlan;
  /** Per layer: q, k, v as bytes at an odd offset. */
  readonly qkv: Uint8Array[];
  /** Per layer and query row. */
  readonly want: { o: Float64Array; lse: Float64Array }[][];
}

/** Plays one step of every request into the plan, the inputs and the oracle's answers. */
function makeStep(options: ScenarioOptions, random: Random, requests: Request[], freeBlocks: number[]): StepCase {
  const { layout } = options;
  const { numLayers, numHeads, numKvHeads, headDim, blockSizeTokens } = layout;
  const segments: number[] = [];
  const blocks: number[] = [];
  const kvSlots: number[] = [];
  const queries: { request: Request; position: number }[] = [];
  const appended: { request: Request; position: number }[] = [];
  for (const request of requests) {
    const count = random.next() < 0.5 ? 1 : random.integer(1, options.maxChunkTokens);
    const first = request.numTokens;
    const queryRowStart = queries.length;
    for (let position = first; position < first + count; position++) {
      const logical = Math.floor(position / blockSizeTokens);
      if (request.blockTable.length === logical) {
        const elsewhere = random.next() < options.holes || freeBlocks.length === 0;
        request.blockTable.push(elsewhere ? null : freeBlocks.splice(random.integer(0, freeBlocks.length - 1), 1)[0]!);
      }
      const physical = request.blockTable[logical];
      queries.push({ request, position });
      if (physical === null || physical === undefined) continue;
      kvSlots.push(physical * blockSizeTokens + (position % blockSizeTokens));
      appended.push({ request, position });
    }
    request.numTokens = first + count;
    const blockStart = blocks.length / 3;
    request.blockTable.forEach((physical, logical) => {
      if (physical === null) return;
      const numTokens = Math.min(blockSizeTokens, request.numTokens - logical * blockSizeTokens);
      blocks.push(physical, logical * blockSizeTokens, numTokens);
    });
    segments.push(queryRowStart, count, first, blockStart, blocks.length / 3 - blockStart);
  }
  const plan: StepPlan = {
    numQueryRows: queries.length,
    numKvRows: appended.length,
    segments: Int32Array.from(segments),
    blocks: Int32Array.from(blocks),
    kvSlots: Int32Array.from(kvSlots),
  };
  const qkv: Uint8Array[] = [];
  const want: StepCase['want'] = [];
  const rowElements = numKvHeads * headDim;
  for (let layer = 0; layer < numLayers; layer++) {
    const q = random
      .floats(queries.length * numHeads * headDim, options.amplitude)
      .map((value) => stored(layout, value));
    const k = random.floats(appended.length * rowElements, 1);
    const v = random.floats(appended.length * rowElements, 1);
    appended.forEach(({ request, position }, row) => {
      const layers = request.history.get(position) ?? [];
      layers[layer] = {
        k: Float64Array.from(k.subarray(row * rowElements, (row + 1) * rowElements), (x) => stored(layout, x)),
        v: Float64Array.from(v.subarray(row * rowElements, (row + 1) * rowElements), (x) => stored(layout, x)),
      };
      request.history.set(position, layers);
    });
    qkv.push(toBytes([q, k, v], random.integer(0, 7), layout.kvDtype));
    want.push(
      queries.map(({ request, position }, row) =>
        oracleRow(
          layout,
          layer,
          q.subarray(row * numHeads * headDim, (row + 1) * numHeads * headDim),
          request.history,
          position,
        ),
      ),
    );
  }
  return { plan, qkv, want };
}

/** All steps of a scenario, made once and played on any number of kernels. */
export function makeScenario(options: ScenarioOptions): StepCase[] {
  const random = new Random(options.seed);
  const freeBlocks = Array.from({ length: options.numBlocks }, (_, i) => i);
  const requests: Request[] = Array.from({ length: options.numRequests }, () => ({
    numTokens: 0,
    blockTable: [],
    history: new Map(),
  }));
  return Array.from({ length: options.numSteps }, () => makeStep(options, random, requests, freeBlocks));
}

/** Plays the steps on a kernel; returns the worst differences from the oracle and all outputs. */
export async function playScenario(
  kernel: AttentionKernel,
  steps: readonly StepCase[],
): Promise<Comparison & { readonly outputs: Float32Array[] }> {
  const { layout } = kernel;
  let output = 0;
  let lse = 0;
  const outputs: Float32Array[] = [];
  for (const { plan, qkv, want } of steps) {
    const step = kernel.beginStep(plan);
    const outs = qkv.map((_, layer) => unaligned(outBytes(layout, plan.numQueryRows), 1 + layer).fill(0xff));
    // All layers in flight at once: the kernel runs them in order.
    await Promise.all(qkv.map((bytes, layer) => attend(kernel, step, layer, bytes, outs[layer]!)));
    kernel.endStep(step);
    outs.forEach((bytes, layer) => {
      const got = outFloats(layout, bytes);
      outputs.push(got);
      want[layer]!.forEach((row, index) => {
        const worst = compareRow(got, index, plan.numQueryRows, layout, row);
        if (!(worst.output <= output)) output = worst.output;
        if (!(worst.lse <= lse)) lse = worst.lse;
      });
    });
  }
  return { output, lse, outputs };
}
