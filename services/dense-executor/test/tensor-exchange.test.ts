/** Dispatch and gather of one wave against shards that answer what the test says: sinks are counted once on every path. */
import {
  emptyFrameHeader,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  type FrameHeader,
  readFrameHeader,
  writeFrameHeader,
} from '@lamina/protocol';
import { describe, expect, test } from 'vitest';
import { buildStep } from '../src/scheduling/step-builder.ts';
import type { ModelDims } from '../src/worker/messages.ts';
import { TensorExchange } from '../src/worker/tensor-exchange.ts';
import { BLOCK, request } from './requests.ts';

const DIMS: ModelDims = { numLayers: 2, hiddenSize: 8, vocabSize: 9, numHeads: 2, numKvHeads: 1, headDim: 8 };
const SINKS = [
  [0.5, -3],
  [40, 1e4],
];

/** One decoding query whose blocks lie on `shards`; every shard answers o = its number + 1 and lse = its number. */
async function gather(shards: string[], dims: ModelDims): Promise<Float32Array[]> {
  const subject = request({ numPromptTokens: 40, numComputed: 39, phase: 'decode', shards });
  const entry = { request: subject, start: 39, numTokens: 1, kvGeneration: 0 };
  const { step } = buildStep([entry], { blockSizeTokens: BLOCK, windowTokens: Number.POSITIVE_INFINITY }, 0, 7);
  const sent: FrameHeader[] = [];
  const exchange = new TensorExchange(dims, {
    maxPayloadBytes: 1 << 20,
    publish: (_, data) => {
      const header = emptyFrameHeader();
      readFrameHeader(data, header);
      if (header.kind === FRAME_KIND.attend) sent.push(header);
    },
  });
  exchange.begin(step, { ...emptyFrameHeader(), stepId: 7 }, (shardId) => shardId, 'reply');
  const layers: Float32Array[] = [];
  for (let layer = 0; layer < dims.numLayers; layer++) {
    const answered = exchange.dispatch(layer, new Float32Array(16), new Float32Array(8), new Float32Array(8));
    for (const asked of sent.splice(0)) {
      const body = new Float32Array(2 * 8 + 2).fill(asked.shardIndex + 1, 0, 16).fill(asked.shardIndex, 16);
      const header = { ...asked, kind: FRAME_KIND.partial, bodyBytes: body.byteLength };
      const frame = new Uint8Array(FRAME_HEADER_BYTES + body.byteLength);
      writeFrameHeader(frame, header);
      frame.set(new Uint8Array(body.buffer), FRAME_HEADER_BYTES);
      expect(exchange.receive(frame, header)).toBe(true);
    }
    await answered;
    layers.push(exchange.gathered().slice());
  }
  return layers;
}

describe.each([
  ['one shard, without a merge', ['a']],
  ['three shards', ['a', 'b', 'c']],
])('%s', (_, shards) => {
  test.each([
    ['no sinks', DIMS],
    ['the sinks of the layer', { ...DIMS, sinkLogits: SINKS }],
  ])('%s', async (_, dims) => {
    const layers = await gather(shards, dims);
    layers.forEach((attention, layer) => {
      for (let head = 0; head < 2; head++) {
        const weights = shards.map((_, shard) => Math.exp(shard));
        const sink = dims.sinkLogits === undefined ? 0 : Math.exp(SINKS[layer]![head]!);
        const sum = weights.reduce((total, weight) => total + weight, sink);
        const want = weights.reduce((total, weight, shard) => total + (weight / sum) * (shard + 1), 0);
        for (const value of attention.subarray(head * 8, head * 8 + 8)) expect(value).toBeCloseTo(want, 6);
      }
    });
  });
});
