/**
 * Owns the tensor plane of one wave: dispatching q, k, v of a layer to the shards and gathering their partial attention.
 * This is the per-layer hot path.
 *
 * Invariants
 * 1. Buffers are made per step and reused for every layer; a layer allocates nothing that grows with the wave.
 * 2. A message buffer is written again only after its shard has answered, so the client has sent it.
 *    After a failed step that is not known, and the buffers are dropped.
 * 3. Partials are merged in the order of the shards, not of arrival: the same inputs give the same bits.
 * 4. Nothing is dispatched unless the executor has held its lease since the step was formed: else the blocks may be other
 *    requests' by now.
 * 5. A frame of another step, layer or origin, or a repeated one, changes nothing.
 * 6. A shard that gets K and V but no query is not waited for in its layer, but before the next one is sent to it
 *    (`stored`), and before the step ends.
 */
import type { TensorLink } from '@lamina/bus';
import {
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  FrameAssembler,
  type FrameHeader,
  splitFrame,
  writeFrameHeader,
} from '@lamina/protocol';
import {
  AttentionGather,
  applySinks,
  asLaminaError,
  attendBytes,
  LaminaError,
  partialBytes,
  type TensorLayout,
} from '@lamina/tensor';
import type { KvLease } from '../kv-lease.ts';
import type { ModelDims, ShardPart, StepRequest } from './messages.ts';
import type { Turns } from './turns.ts';
import { PartialRows, packRows, toRuns, type WireElements, wireElements } from './wire-rows.ts';

/** Attention of some rows that was computed here. */
export interface LocalPartial {
  /** [rows.length, numHeads, headDim] float32, normalized over the keys that were seen. */
  readonly output: Float32Array;
  /** [rows.length, numHeads] float32 */
  readonly logSumExp: Float32Array;
  /** Rows of the wave. */
  readonly rows: Int32Array;
}

/** What the exchange needs of the connection. */
export type ExchangeLink = Pick<TensorLink, 'publish' | 'maxPayloadBytes'>;

class ShardLink {
  readonly shardId: string;
  readonly subject: string;
  /** Rows of the wave whose queries it has, ascending. */
  readonly rows: Int32Array;
  readonly queryRuns: Int32Array;
  readonly kvRuns: Int32Array;
  /** Header, then q, k, v. */
  readonly message: Uint8Array;
  readonly payload: WireElements;
  readonly header: FrameHeader;
  readonly partialBytes: number;
  readonly partial: PartialRows;
  readonly assembler = new FrameAssembler();
  hasAnswered = false;

  constructor(part: ShardPart, subject: string, header: FrameHeader, layout: TensorLayout) {
    const numQueryRows = part.queryRows.length;
    const numKvRows = part.kvRows.length;
    this.shardId = part.shardId;
    this.subject = subject;
    this.rows = part.queryRows;
    this.queryRuns = toRuns(part.queryRows);
    this.kvRuns = toRuns(part.kvRows);
    const bodyBytes = attendBytes({ numQueryRows, numKvRows }, layout);
    const message = new ArrayBuffer(FRAME_HEADER_BYTES + bodyBytes);
    this.message = new Uint8Array(message);
    this.payload = wireElements(layout.kvDtype, message, FRAME_HEADER_BYTES);
    this.header = { ...header, kind: FRAME_KIND.attend, bodyBytes };
    this.partialBytes = partialBytes(numQueryRows, layout);
    this.partial = new PartialRows(numQueryRows, layout, layout.kvDtype);
  }

  get output(): Float32Array {
    return this.partial.output;
  }

  get logSumExp(): Float32Array {
    return this.partial.logSumExp;
  }
}

export class TensorExchange {
  readonly #dims: ModelDims;
  readonly #link: ExchangeLink;
  readonly #lease: Pick<KvLease, 'allows'>;
  readonly #turns: Turns;
  readonly #gather: AttentionGather;
  #links: ShardLink[] = [];
  #local: LocalPartial | undefined;
  #only: LocalPartial | undefined;
  #merged = new Float32Array(0);
  #numTokens = 0;
  #stepId = -1;
  #leaseTerm = -1;
  #layer = -1;
  /** Shards that have not answered the dispatched layer: those with queries, and all. */
  #numWaiting = 0;
  #numUnanswered = 0;
  #resolve: (() => void) | undefined;
  #reject: ((error: LaminaError) => void) | undefined;
  #onStored: { readonly resolve: () => void; readonly reject: (error: LaminaError) => void } | undefined;
  /** A failure that came while nothing was waited for: the next dispatch reports it. */
  #failure: LaminaError | undefined;
  /** performance.now() of the last dispatch; NaN while nothing is waited for. */
  dispatchedAtMs = Number.NaN;

  constructor(dims: ModelDims, link: ExchangeLink, lease: Pick<KvLease, 'allows'>, turns: Turns) {
    this.#dims = dims;
    this.#lease = lease;
    this.#turns = turns;
    this.#link = link;
    this.#gather = new AttentionGather(dims.numHeads, dims.headDim);
  }

  /**
   * Sends the plans of a step. `header` carries originId, waveIndex and stepId.
   * @param local Where the part of the attention will be that is computed here, if the step has one.
   */
  begin(
    step: StepRequest,
    header: FrameHeader,
    subjectOf: (shardId: string) => string,
    replySubjectOf: (shardIndex: number) => string,
    local?: LocalPartial,
  ): void {
    this.#local = local;
    this.#numUnanswered = 0;
    this.#numTokens = step.tokenIds.length;
    this.#stepId = step.stepId;
    this.#leaseTerm = step.leaseTerm;
    this.#layer = -1;
    this.#failure = undefined;
    const layout = { ...this.#dims, kvDtype: step.kvDtype };
    this.#links = step.shards.map((part, shardIndex) => {
      const link = new ShardLink(part, subjectOf(part.shardId), { ...header, shardIndex }, layout);
      const planHeader: FrameHeader = {
        ...header,
        shardIndex,
        kind: FRAME_KIND.plan,
        layer: 0,
        partOffset: 0,
        bodyBytes: part.plan.length - FRAME_HEADER_BYTES,
      };
      writeFrameHeader(part.plan, planHeader);
      for (const frame of splitFrame(part.plan, planHeader, this.#link.maxPayloadBytes)) {
        this.#link.publish(link.subject, frame, replySubjectOf(shardIndex));
      }
      return link;
    });
    const width = this.#dims.numHeads * this.#dims.headDim;
    this.#only = this.#onlyPartial();
    if (this.#only === undefined && this.#merged.length < this.#numTokens * width)
      this.#merged = new Float32Array(this.#numTokens * width);
  }

  /** The one partial that has all rows, if nothing else has any: it is the attention, without a merge. */
  #onlyPartial(): LocalPartial | undefined {
    let only = this.#local;
    for (const link of this.#links) {
      if (link.rows.length === 0) continue;
      if (only !== undefined) return undefined;
      only = link;
    }
    return only?.rows.length === this.#numTokens ? only : undefined;
  }

  /**
   * Sends one layer. The promise resolves when every shard that has queries has answered, and rejects when the step fails.
   * @param query [numTokens, numHeads * headDim] float32; `key` and `value` [numTokens, numKvHeads * headDim].
   */
  dispatch(layer: number, query: Float32Array, key: Float32Array, value: Float32Array): Promise<void> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    if (!this.#lease.allows(this.#leaseTerm)) return Promise.reject(leaseEnded());
    const { numHeads, numKvHeads, headDim } = this.#dims;
    this.#layer = layer;
    this.#numUnanswered = this.#links.length;
    this.#numWaiting = 0;
    for (const link of this.#links) {
      if (link.rows.length > 0) this.#numWaiting++;
      let at = packRows(link.payload, 0, query, link.queryRuns, numHeads * headDim);
      at = packRows(link.payload, at, key, link.kvRuns, numKvHeads * headDim);
      packRows(link.payload, at, value, link.kvRuns, numKvHeads * headDim);
      link.header.layer = layer;
      link.hasAnswered = false;
      if (link.message.length <= this.#link.maxPayloadBytes) {
        writeFrameHeader(link.message, link.header);
        this.#link.publish(link.subject, link.message);
      } else
        for (const frame of splitFrame(link.message, link.header, this.#link.maxPayloadBytes))
          this.#link.publish(link.subject, frame);
    }
    if (this.#numUnanswered > 0) this.dispatchedAtMs = performance.now();
    if (this.#numWaiting === 0) return Promise.resolve();
    return new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
      this.#turns.numRunnable--;
    });
  }

  /** Takes a partial of this wave. Returns false if it belongs to nothing that is waited for. */
  receive(frame: Uint8Array, header: FrameHeader): boolean {
    if (header.stepId !== this.#stepId || header.layer !== this.#layer) return false;
    const link = this.#links[header.shardIndex];
    if (link === undefined || link.hasAnswered) return false;
    if (header.bodyBytes !== link.partialBytes) {
      this.fail(
        new LaminaError(
          'protocol_violation',
          `a shard answers ${header.bodyBytes} bytes where ${link.partialBytes} belong`,
        ),
        [link.shardId],
        true,
      );
      return true;
    }
    let body: Uint8Array | undefined;
    try {
      body = link.assembler.push(frame, header);
    } catch (cause) {
      this.fail(asLaminaError(cause), [link.shardId], true);
      return true;
    }
    if (body === undefined) return true;
    link.partial.read(body);
    link.hasAnswered = true;
    if (--this.#numUnanswered === 0) {
      this.dispatchedAtMs = Number.NaN;
      this.#onStored?.resolve();
      this.#onStored = undefined;
    }
    if (link.rows.length > 0 && --this.#numWaiting === 0) this.#settle()?.();
    return true;
  }

  /** Undefined when every shard has answered the dispatched layer, else a promise of that, which rejects when the step fails. */
  stored(): Promise<void> | undefined {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    if (this.#numUnanswered === 0) return undefined;
    return new Promise((resolve, reject) => {
      this.#onStored = { resolve, reject };
    });
  }

  /** Nobody listens to what was sent to a shard: it died, or it is about to connect again. */
  shardIsGone(shardIndex: number): void {
    const link = this.#links[shardIndex];
    if (link !== undefined)
      this.fail(new LaminaError('unavailable', `${link.shardId} does not listen`), [link.shardId]);
  }

  /** A shard says that it cannot answer, or its answer was damaged: fails the step it names, if that is in flight. */
  receiveFailure(header: FrameHeader, error: LaminaError): void {
    const link = this.#links[header.shardIndex];
    if (header.stepId === this.#stepId && link !== undefined) this.fail(error, [link.shardId], true);
  }

  /**
   * The gathered attention of the dispatched layer, [numTokens, numHeads * headDim] float32, valid until the next one.
   * Call once per layer: sinks are counted here.
   * @throws LaminaError `protocol_violation` when no shard saw a key of some query.
   */
  gathered(): Float32Array {
    if (this.#failure !== undefined) throw this.#failure;
    const sinkLogits = this.#dims.sinkLogits?.[this.#layer];
    const only = this.#only;
    if (only !== undefined) {
      if (sinkLogits !== undefined) applySinks(only.output, only.logSumExp, sinkLogits);
      return only.output;
    }
    const merged = this.#merged.subarray(0, this.#numTokens * this.#dims.numHeads * this.#dims.headDim);
    this.#gather.begin(merged, this.#numTokens);
    for (const link of this.#links) this.#gather.add(link.output, link.logSumExp, link.rows);
    const local = this.#local;
    if (local !== undefined) this.#gather.add(local.output, local.logSumExp, local.rows);
    const uncovered = this.#gather.finish(sinkLogits);
    if (uncovered >= 0) throw new LaminaError('protocol_violation', `no shard attended query row ${uncovered}`);
    return merged;
  }

  /** Shards of the step in flight that have not answered the dispatched layer. */
  get waitingShardIds(): string[] {
    return this.#numUnanswered === 0 ? [] : this.#links.filter((link) => !link.hasAnswered).map((link) => link.shardId);
  }

  usesShard(shardId: string): boolean {
    return this.#links.some((link) => link.shardId === shardId);
  }

  /** Fails the step with this id, if it is in flight, with a failure after which the same tokens may run again. */
  abort(stepId: number): void {
    if (stepId === this.#stepId) this.fail(new LaminaError('unavailable', 'the step was aborted'), []);
  }

  /** Fails the step in flight; its buffers are dropped. `shardIds` are to blame; `isRefusal` as in StepFailed. */
  fail(error: LaminaError, shardIds: readonly string[], isRefusal = false): void {
    const reject = this.#reject ?? this.#onStored?.reject;
    this.#settle();
    this.#onStored = undefined;
    this.#numUnanswered = 0;
    this.#links = [];
    this.#stepId = -1;
    this.dispatchedAtMs = Number.NaN;
    const failure = new LaminaError(error.code, error.message, { cause: error, diagnostics: { shardIds, isRefusal } });
    if (reject === undefined) this.#failure = failure;
    else reject(failure);
  }

  #settle(): (() => void) | undefined {
    const resolve = this.#resolve;
    if (resolve !== undefined) this.#turns.numRunnable++;
    this.#resolve = undefined;
    this.#reject = undefined;
    return resolve;
  }
}

function leaseEnded(): LaminaError {
  return new LaminaError(
    'unavailable',
    'the kv-manager has not answered in time; KV must not be written until it does',
  );
}
