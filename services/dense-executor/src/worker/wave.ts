/**
 * Owns one wave: running a step through all layers, and what it cost.
 *
 * Invariants
 * 1. A step passes the layer cycle that is compiled from the request machine; an event that the machine forbids ends it.
 * 2. Between the request of a step and its result nothing is looked up, logged or asked of another thread.
 */
import type { TensorLink } from '@lamina/bus';
import { FRAME_KIND, type FrameHeader, SUBJECTS } from '@lamina/protocol';
import type { LaminaError } from '@lamina/tensor';
import { Tensor } from 'onnxruntime-node';
import type { KvLease } from '../kv-lease.ts';
import { LAYER_EVENT, LayerCursor } from '../request/layer-cycle.ts';
import { Sampler } from '../request/sampler.ts';
import type { DenseSession } from './dense-session.ts';
import {
  type ModelDims,
  NOT_WANTED,
  SAMPLING_FIELDS,
  type StepDone,
  type StepFailed,
  type StepRequest,
} from './messages.ts';
import { SelfAttention } from './self-attention.ts';
import { floatsOf, type LayerOutputs, StageOutputs } from './stage-outputs.ts';
import { stepError } from './step-error.ts';
import { TensorExchange } from './tensor-exchange.ts';
import type { Turns } from './turns.ts';

/** The thread waits in the socket for so long; then the event loop has its turn, and what else is to be heard is heard. */
const MAX_BLOCK_MS = 2;
const MAX_BLOCK_US = 1000 * MAX_BLOCK_MS;
/** Few rows are answered so soon that sleeping meanwhile costs more than the core: an answer to one takes some 150 us. */
const MAX_SPIN_ROWS = 4;
const SPIN_US = 300;

export class Wave {
  readonly exchange: TensorExchange;
  /** Of the steps that are run from now on. */
  originId: number;
  readonly #dims: ModelDims;
  readonly #session: DenseSession;
  readonly #stageOutputs: StageOutputs;
  readonly #self: SelfAttention;
  readonly #sampler: Sampler;
  readonly #cursor: LayerCursor;
  readonly #isBodyChecked: boolean;
  readonly #link: TensorLink;
  readonly #turns: Turns;
  readonly #replySubjectOf: (waveIndex: number, shardIndex: number) => string;

  constructor(options: {
    dims: ModelDims;
    session: DenseSession;
    /** Of the attention of chunks to themselves. */
    attentionThreads: number;
    link: TensorLink;
    layerCycle: Uint8Array;
    originId: number;
    isBodyChecked: boolean;
    replySubjectOf: (waveIndex: number, shardIndex: number) => string;
    lease: Pick<KvLease, 'allows'>;
    turns: Turns;
  }) {
    this.#dims = options.dims;
    this.#session = options.session;
    this.#stageOutputs = new StageOutputs(options.dims);
    this.#self = new SelfAttention(options.dims, options.attentionThreads);
    this.#sampler = new Sampler(options.dims.vocabSize);
    this.#cursor = new LayerCursor(options.layerCycle);
    this.originId = options.originId;
    this.#isBodyChecked = options.isBodyChecked;
    this.#replySubjectOf = options.replySubjectOf;
    this.exchange = new TensorExchange(options.dims, options.link, options.lease, options.turns);
    this.#link = options.link;
    this.#turns = options.turns;
  }

  close(): Promise<void> {
    return this.#self.close();
  }

  /** Never rejects: a failed step is a result. */
  async run(step: StepRequest): Promise<StepDone | StepFailed> {
    this.#turns.numRunnable++;
    try {
      return await this.#run(step);
    } catch (cause) {
      const error = stepError(cause);
      this.exchange.fail(error, []);
      return {
        kind: 'stepFailed',
        waveIndex: step.waveIndex,
        stepId: step.stepId,
        code: error.code,
        message: error.message,
        shardIds: shardIdsOf(error),
        isRefusal: error.diagnostics.isRefusal === true,
      };
    } finally {
      this.#turns.numRunnable--;
    }
  }

  async #run(step: StepRequest): Promise<StepDone> {
    const { numLayers, numHeads, headDim } = this.#dims;
    const cursor = this.#cursor;
    const exchange = this.exchange;
    const numTokens = step.tokenIds.length;
    const startedMs = performance.now();
    const link = this.#link;
    const turns = this.#turns;
    const spinUs = numTokens <= MAX_SPIN_ROWS ? SPIN_US : 0;
    let denseMs = 0;
    let waitMs = 0;
    let codecMs = 0;

    cursor.restart();
    const header: FrameHeader = {
      kind: FRAME_KIND.plan,
      layer: 0,
      stepId: step.stepId,
      waveIndex: step.waveIndex,
      shardIndex: 0,
      bodyBytes: 0,
      partOffset: 0,
      originId: this.originId,
      isBodyChecked: this.#isBodyChecked,
    };
    const self = step.self === null ? undefined : this.#self;
    const selfBegun = step.self === null ? undefined : this.#self.begin(step.self);
    // Awaited below, unless the exchange refuses the step before.
    selfBegun?.catch(() => undefined);
    exchange.begin(
      step,
      header,
      SUBJECTS.shardTensors,
      (shardIndex) => this.#replySubjectOf(step.waveIndex, shardIndex),
      self,
    );
    // The exchange knows the step by now: what aborts or fails it meanwhile is not lost.
    if (selfBegun !== undefined) await selfBegun;
    const stageOutputs = this.#stageOutputs;
    stageOutputs.begin(numTokens);
    const tokenIds = new Tensor('int64', step.tokenIds, [1, numTokens]);
    const positionIds = new Tensor('int64', step.positionIds, [1, numTokens]);
    const attentionShape = [1, numTokens, numHeads * headDim];
    let outputs: LayerOutputs | undefined;
    let attention: Tensor | undefined;
    let markMs = performance.now();
    codecMs += markMs - startedMs;

    for (let layer = 0; layer < numLayers; layer++) {
      outputs =
        outputs === undefined || attention === undefined
          ? await this.#session.embed(tokenIds, positionIds, stageOutputs.next())
          : await this.#session.layer(layer, positionIds, outputs.hidden, attention, stageOutputs.next());
      cursor.advance(LAYER_EVENT.QKV_READY);
      const denseDoneMs = performance.now();
      const stored = exchange.stored();
      if (stored !== undefined) await stored;
      const storedMs = performance.now();
      const answered = exchange.dispatch(layer, outputs.query, outputs.key, outputs.value);
      cursor.advance(LAYER_EVENT.DISPATCHED);
      const dispatchedMs = performance.now();
      if (self === undefined) {
        while (
          turns.numRunnable === 0 &&
          link.receive(MAX_BLOCK_US, spinUs) &&
          performance.now() - dispatchedMs < MAX_BLOCK_MS
        );
        await answered;
      } else {
        // What is computed here is told by the event loop: no other wave may keep it from that.
        turns.numRunnable++;
        await Promise.all([answered, self.attend(layer, outputs.query, outputs.key, outputs.value)]).finally(() => {
          turns.numRunnable--;
        });
      }
      const answeredMs = performance.now();
      attention = new Tensor('float32', exchange.gathered(), attentionShape);
      cursor.advance(LAYER_EVENT.GATHERED);
      denseMs += denseDoneMs - markMs;
      codecMs += dispatchedMs - storedMs;
      waitMs += storedMs - denseDoneMs + answeredMs - dispatchedMs;
      markMs = performance.now();
      codecMs += markMs - answeredMs;
    }

    const sampled = emptySample(step);
    let sampledMs = markMs;
    if (step.sampledRows.length === 0 || outputs === undefined || attention === undefined) {
      cursor.advance(LAYER_EVENT.CHUNK_READY);
    } else {
      const rows = new Tensor('int64', BigInt64Array.from(step.sampledRows, BigInt), [step.sampledRows.length]);
      const logits = stageOutputs.logits(step.sampledRows.length);
      await this.#session.logits(outputs.hidden, attention, rows, logits);
      cursor.advance(LAYER_EVENT.LOGITS_READY);
      const logitsMs = performance.now();
      denseMs += logitsMs - markMs;
      this.#sample(step, floatsOf(logits), sampled);
      sampledMs = performance.now();
      markMs = logitsMs;
    }
    await exchange.stored();
    const totalMs = performance.now() - startedMs;
    return {
      kind: 'stepDone',
      waveIndex: step.waveIndex,
      stepId: step.stepId,
      ...sampled,
      timings: { denseMs, waitMs, codecMs, sampleMs: sampledMs - markMs, totalMs },
    };
  }

  /** @param logits [sampledRows.length, vocabSize] float32 */
  #sample(
    step: StepRequest,
    logits: Float32Array,
    into: { tokens: Int32Array; logprobs: Float64Array; topLogprobs: { token: number; logprob: number }[][] | null },
  ): void {
    const { vocabSize } = this.#dims;
    let isWanted = true;
    for (let i = 0; i < step.sampledRows.length; i++) {
      const at = i * SAMPLING_FIELDS;
      const fields = step.sampling;
      const isDraftNext = fields[at + 7] === 1;
      if (!isWanted) {
        into.tokens[i] = NOT_WANTED;
        isWanted = !isDraftNext;
        continue;
      }
      const result = this.#sampler.sample(logits.subarray(i * vocabSize, (i + 1) * vocabSize), {
        temperature: fields[at]!,
        topP: fields[at + 1]!,
        topK: fields[at + 2]!,
        minP: fields[at + 3]!,
        seed: fields[at + 4]!,
        tokenIndex: fields[at + 5]!,
        numLogprobs: fields[at + 6]!,
      });
      into.tokens[i] = result.token;
      isWanted = !isDraftNext || result.token === Number(step.tokenIds[step.sampledRows[i]! + 1]);
      into.logprobs[i] = result.logprob;
      if (into.topLogprobs !== null) into.topLogprobs[i] = result.topLogprobs;
    }
  }
}

function emptySample(step: StepRequest): {
  tokens: Int32Array;
  logprobs: Float64Array;
  topLogprobs: { token: number; logprob: number }[][] | null;
} {
  const numRows = step.sampledRows.length;
  let wantsTop = false;
  for (let i = 0; i < numRows; i++) wantsTop ||= step.sampling[i * SAMPLING_FIELDS + 6]! > 0;
  return {
    tokens: new Int32Array(numRows),
    logprobs: new Float64Array(numRows),
    topLogprobs: wantsTop ? Array.from({ length: numRows }, () => []) : null,
  };
}

function shardIdsOf(error: LaminaError): string[] {
  const { shardIds } = error.diagnostics;
  return Array.isArray(shardIds) ? shardIds.filter((shardId) => typeof shardId === 'string') : [];
}
