/**
 * Dispatch and gather of one wave against shards that answer what the test says: sinks are counted once on every path, a
 * step that fails says why, and nothing is written without the lease.
 */
import {
  emptyFrameHeader,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  type FrameHeader,
  readFrameHeader,
  writeFrameHeader,
} from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import { describe, expect, test } from 'vitest';
import { KvLease } from '../src/kv-lease.ts';
import { buildStep } from '../src/scheduling/step-builder.ts';
import type { ModelDims } from '../src/worker/messages.ts';
import { type LocalPartial, TensorExchange } from '../src/worker/tensor-exchange.ts';
import { Turns } from '../src/worker/turns.ts';
import { BLOCK, request } from './requests.ts';

const DIMS: ModelDims = { numLayers: 2, hiddenSize: 8, vocabSize: 9, numHeads: 2, numKvHeads: 1, headDim: 8, scale: 1 };
const SINKS = [
  [0.5, -3],
  [40, 1e4],
];

/** One step of one decoding query whose blocks lie on `shards`. */
class Step {
  readonly lease = new KvLease();
  /** Layers that were sent and not answered. */
  readonly sent: FrameHeader[] = [];
  readonly replySubjects: (string | undefined)[] = [];
  readonly exchange: TensorExchange;

  constructor(shards: string[], dims = DIMS) {
    this.exchange = new TensorExchange(
      dims,
      {
        maxPayloadBytes: 1 << 20,
        publish: (_, data, reply) => {
          const header = emptyFrameHeader();
          readFrameHeader(data, header);
          if (header.kind === FRAME_KIND.attend) this.sent.push(header);
          else this.replySubjects.push(reply);
        },
      },
      this.lease,
      new Turns(),
    );
    this.hold();
    this.begin(shards, 7);
  }

  hold(): void {
    this.lease.renew(this.lease.mark(), 60_000);
  }

  /** The lease is over. */
  lose(): void {
    this.lease.renew(this.lease.mark(), 0);
  }

  begin(shards: string[], stepId: number): void {
    this.sent.length = 0;
    const subject = request({ numPromptTokens: 40, numComputed: 39, phase: 'decode', shards });
    const entry = { request: subject, start: 39, numTokens: 1, draft: [], kvGeneration: 0 };
    const { step } = buildStep(
      [entry],
      { blockSizeTokens: BLOCK, windowTokens: Number.POSITIVE_INFINITY, kvDtype: 'f32' },
      0,
      stepId,
      this.lease.term,
    );
    const header = { ...emptyFrameHeader(), stepId };
    this.exchange.begin(
      step,
      header,
      (shardId) => shardId,
      (shardIndex) => `reply.${shardIndex}`,
    );
  }

  dispatch(layer: number): Promise<void> {
    return this.exchange.dispatch(layer, new Float32Array(16), new Float32Array(8), new Float32Array(8));
  }

  /** A shard answers o = its number + 1 and lse = its number. */
  answer(asked: FrameHeader): boolean {
    const body = new Float32Array(2 * 8 + 2).fill(asked.shardIndex + 1, 0, 16).fill(asked.shardIndex, 16);
    const header = { ...asked, kind: FRAME_KIND.partial, bodyBytes: body.byteLength };
    const frame = new Uint8Array(FRAME_HEADER_BYTES + body.byteLength);
    writeFrameHeader(frame, header);
    frame.set(new Uint8Array(body.buffer), FRAME_HEADER_BYTES);
    return this.exchange.receive(frame, header);
  }

  /** Runs one layer to its end. */
  async layer(layer: number): Promise<Float32Array> {
    const answered = this.dispatch(layer);
    for (const asked of this.sent.splice(0)) expect(this.answer(asked)).toBe(true);
    await answered;
    return this.exchange.gathered().slice();
  }
}

describe.each([
  ['one shard, without a merge', ['a']],
  ['three shards', ['a', 'b', 'c']],
])('%s', (_, shards) => {
  test.each([
    ['no sinks', DIMS],
    ['the sinks of the layer', { ...DIMS, sinkLogits: SINKS }],
  ])('%s', async (_, dims) => {
    const step = new Step(shards, dims);
    for (let layer = 0; layer < dims.numLayers; layer++) {
      const attention = await step.layer(layer);
      for (let head = 0; head < 2; head++) {
        const weights = shards.map((_, shard) => Math.exp(shard));
        const sink = dims.sinkLogits === undefined ? 0 : Math.exp(SINKS[layer]![head]!);
        const sum = weights.reduce((total, weight) => total + weight, sink);
        const want = weights.reduce((total, weight, shard) => total + (weight / sum) * (shard + 1), 0);
        for (const value of attention.subarray(head * 8, head * 8 + 8)) expect(value).toBeCloseTo(want, 6);
      }
    }
  });
});

describe('a step that fails', () => {
  test('because the lease ended between two layers sends nothing more, and blames no shard', async () => {
    const step = new Step(['a', 'b']);
    await step.layer(0);
    step.lose();
    await expect(step.dispatch(1)).rejects.toMatchObject({ code: 'unavailable', diagnostics: {} });
    expect(step.sent).toEqual([]);
    // Held again: the next step is another one, the rest of this one stays unsent.
    step.exchange.fail(new LaminaError('unavailable', 'lease'), []);
    step.hold();
    await expect(step.dispatch(1)).rejects.toMatchObject({ message: 'lease' });
    expect(step.sent).toEqual([]);
  });

  test('because the lease was over for a while sends nothing more, though it is held again', async () => {
    const step = new Step(['a', 'b']);
    await step.layer(0);
    step.lose();
    step.hold();
    await expect(step.dispatch(1)).rejects.toMatchObject({ code: 'unavailable' });
    expect(step.sent).toEqual([]);
    step.begin(['a', 'b'], 8);
    await step.layer(0);
    // The kv-manager had forgotten this executor, whatever the clock says.
    step.lease.end();
    step.lease.renew(step.lease.mark(), 60_000);
    await expect(step.dispatch(1)).rejects.toMatchObject({ code: 'unavailable' });
    expect(step.sent).toEqual([]);
  });

  test('because a shard does not listen says which, while a layer is waited for and while none is', async () => {
    const step = new Step(['a', 'b']);
    expect(step.replySubjects).toEqual(['reply.0', 'reply.1']);
    step.exchange.shardIsGone(1);
    const why = { code: 'unavailable', message: 'b does not listen', diagnostics: { shardIds: ['b'] } };
    await expect(step.dispatch(0)).rejects.toMatchObject(why);
    expect(step.sent).toEqual([]);

    step.begin(['a', 'b'], 8);
    const answered = step.dispatch(0);
    step.exchange.shardIsGone(1);
    await expect(answered).rejects.toMatchObject(why);

    step.begin(['a', 'b'], 9);
    step.exchange.shardIsGone(2);
    await step.layer(0);
  });

  test('keeps its reason when more goes wrong, and leaves none to the next step', async () => {
    const step = new Step(['a', 'b']);
    const answered = step.dispatch(0);
    for (const asked of step.sent.splice(0)) step.answer(asked);
    // Answered, and before the wave goes on the connection breaks.
    step.exchange.fail(new LaminaError('unavailable', 'the connection to NATS was lost'), []);
    await answered;
    expect(() => step.exchange.gathered()).toThrow('the connection to NATS was lost');
    await expect(step.dispatch(1)).rejects.toMatchObject({ message: 'the connection to NATS was lost' });

    step.begin(['a', 'b'], 8);
    await step.layer(0);
    const failing = step.dispatch(1);
    step.exchange.receiveFailure({ ...step.sent[0]!, shardIndex: 1 }, new LaminaError('numeric_error', 'NaN'));
    await expect(failing).rejects.toMatchObject({ code: 'numeric_error', diagnostics: { shardIds: ['b'] } });
  });

  test('because a part of an answer is missing says so, and does not wait for it', async () => {
    const step = new Step(['a', 'b']);
    const answered = step.dispatch(0);
    const asked = step.sent[1]!;
    const header = { ...asked, kind: FRAME_KIND.partial, bodyBytes: 72, partOffset: 40 };
    const frame = new Uint8Array(FRAME_HEADER_BYTES + 32);
    writeFrameHeader(frame, header);
    expect(step.exchange.receive(frame, header)).toBe(true);
    await expect(answered).rejects.toMatchObject({ code: 'protocol_violation', diagnostics: { shardIds: ['b'] } });
  });

  test('says whether only a frame was refused: by a shard, damaged, or of another size', async () => {
    const step = new Step(['a', 'b']);
    const refused = { diagnostics: { shardIds: ['a'], isRefusal: true } };
    const first = step.dispatch(0);
    step.exchange.receiveFailure(step.sent[0]!, new LaminaError('protocol_violation', 'no such step'));
    await expect(first).rejects.toMatchObject(refused);
    step.begin(['a', 'b'], 8);
    const second = step.dispatch(0);
    const frame = new Uint8Array(FRAME_HEADER_BYTES + 4);
    const header = { ...step.sent[0]!, kind: FRAME_KIND.partial, bodyBytes: 4 };
    writeFrameHeader(frame, header);
    expect(step.exchange.receive(frame, header)).toBe(true);
    await expect(second).rejects.toMatchObject({ code: 'protocol_violation', ...refused });
    step.begin(['a', 'b'], 9);
    step.exchange.shardIsGone(0);
    await expect(step.dispatch(0)).rejects.toMatchObject({ diagnostics: { shardIds: ['a'], isRefusal: false } });
  });

  test('because it is aborted ends at once or sends nothing more, and blames no shard; another step goes on', async () => {
    const step = new Step(['a', 'b']);
    const answered = step.dispatch(0);
    step.exchange.abort(6);
    expect(step.exchange.waitingShardIds).toEqual(['a', 'b']);
    step.exchange.abort(7);
    const why = { code: 'unavailable', message: 'the step was aborted', diagnostics: { shardIds: [] } };
    await expect(answered).rejects.toMatchObject(why);

    step.begin(['a', 'b'], 8);
    step.exchange.abort(7);
    await step.layer(0);
    step.exchange.abort(8);
    await expect(step.dispatch(1)).rejects.toMatchObject(why);
    expect(step.sent).toEqual([]);
  });

  test('takes no answer of another step, layer or shard, nor one twice', async () => {
    const step = new Step(['a', 'b']);
    const answered = step.dispatch(0);
    const [first, second] = step.sent.splice(0);
    for (const other of [{ stepId: 6 }, { layer: 1 }, { shardIndex: 2 }])
      expect(step.answer({ ...first!, ...other })).toBe(false);
    expect([step.answer(first!), step.answer(first!)]).toEqual([true, false]);
    expect(step.exchange.waitingShardIds).toEqual(['b']);
    expect(step.answer(second!)).toBe(true);
    await answered;
    expect(step.answer(second!)).toBe(false);
  });
});

/** A step of one chunk of 16 tokens that sees itself, after `start` tokens on the shards. */
function chunk(
  start: number,
  shards: string[],
): { exchange: TensorExchange; sent: FrameHeader[]; local: LocalPartial } {
  const lease = new KvLease();
  lease.renew(lease.mark(), 60_000);
  const sent: FrameHeader[] = [];
  const link = {
    maxPayloadBytes: 1 << 20,
    publish: (_: string, data: Uint8Array) => {
      const header = emptyFrameHeader();
      readFrameHeader(data, header);
      if (header.kind === FRAME_KIND.attend) sent.push(header);
    },
  };
  const exchange = new TensorExchange(DIMS, link, lease, new Turns());
  const subject = request({ numPromptTokens: 64, numComputed: start, shards });
  const { step } = buildStep(
    [{ request: subject, start, numTokens: 16, draft: [], kvGeneration: 0 }],
    { blockSizeTokens: BLOCK, windowTokens: Number.POSITIVE_INFINITY, kvDtype: 'f32' },
    0,
    7,
    lease.term,
  );
  const rows = step.self?.rows ?? new Int32Array(0);
  expect([...rows]).toEqual(Array.from({ length: 16 }, (_, row) => row));
  const local = { output: new Float32Array(16 * 16).fill(5), logSumExp: new Float32Array(16 * 2), rows };
  const header = { ...emptyFrameHeader(), stepId: 7 };
  exchange.begin(step, header, String, String, local);
  return { exchange, sent, local };
}

const dispatchChunk = (exchange: TensorExchange, layer: number): Promise<void> =>
  exchange.dispatch(layer, new Float32Array(16 * 16), new Float32Array(16 * 8), new Float32Array(16 * 8));

/** A shard answers `numRows` rows of o = 1 and lse = 0. */
function answerRows(exchange: TensorExchange, asked: FrameHeader, numRows: number): boolean {
  const body = new Float32Array(numRows * (16 + 2)).fill(1, 0, numRows * 16);
  const header = { ...asked, kind: FRAME_KIND.partial, bodyBytes: body.byteLength };
  const frame = new Uint8Array(FRAME_HEADER_BYTES + body.byteLength);
  writeFrameHeader(frame, header);
  frame.set(new Uint8Array(body.buffer), FRAME_HEADER_BYTES);
  return exchange.receive(frame, header);
}

describe('a chunk that sees itself', () => {
  test('sends its first shard K and V only, waits for it before the next layer, and needs no merge', async () => {
    const { exchange, sent, local } = chunk(0, ['a']);
    await dispatchChunk(exchange, 0);
    expect(exchange.gathered()).toBe(local.output);
    expect(sent.map(({ bodyBytes }) => bodyBytes)).toEqual([2 * 16 * 8 * 4]);
    expect(exchange.waitingShardIds).toEqual(['a']);
    expect(exchange.dispatchedAtMs).toBeGreaterThan(0);
    const stored = exchange.stored();
    expect(answerRows(exchange, sent[0]!, 0)).toBe(true);
    await stored;
    expect(exchange.stored()).toBeUndefined();
    expect(exchange.dispatchedAtMs).toBeNaN();
    await dispatchChunk(exchange, 1);
    expect(sent).toHaveLength(2);
  });

  test('is merged with what shards see before it', async () => {
    const { exchange, sent } = chunk(16, ['a', 'b']);
    const answered = dispatchChunk(exchange, 0);
    // The first block is on a, the chunk's own on b.
    expect(sent.map(({ bodyBytes }) => bodyBytes)).toEqual([16 * 16 * 4, 2 * 16 * 8 * 4]);
    expect(answerRows(exchange, sent[0]!, 16)).toBe(true);
    await answered;
    // Both halves have the log-sum-exp 0.
    expect([...new Set(exchange.gathered())]).toEqual([3]);
    expect(exchange.waitingShardIds).toEqual(['b']);
  });

  test('fails when a shard that only stores fails, at once or at the next look', async () => {
    const waiting = chunk(0, ['a']);
    await dispatchChunk(waiting.exchange, 0);
    const stored = waiting.exchange.stored();
    waiting.exchange.receiveFailure(waiting.sent[0]!, new LaminaError('protocol_violation', 'no such slot'));
    await expect(stored).rejects.toMatchObject({ code: 'protocol_violation', diagnostics: { shardIds: ['a'] } });

    const computing = chunk(0, ['a']);
    await dispatchChunk(computing.exchange, 0);
    computing.exchange.shardIsGone(0);
    expect(() => computing.exchange.gathered()).toThrow('a does not listen');
    await expect(computing.exchange.stored()).rejects.toMatchObject({ code: 'unavailable' });
  });
});
