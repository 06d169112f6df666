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
 */
import {
  attendBytes,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  FrameAssembler,
  type FrameHeader,
  partialBytes,
  splitFrame,
  writeFrameHeader,
} from '@lamina/protocol';
import { AttentionGather, applySinks, LaminaError } from '@lamina/tensor';
import type { KvLease } from '../kv-lease.ts';
import type { ModelDims, ShardPart, StepRequest } from './messages.ts';

export interface TensorTransport {
  publish(subject: string, data: Uint8Array, reply?: string): void;
  readonly maxPayloadBytes: number;
}

/** Consecutive rows of the wave that go to consecutive rows of a message: start, length pairs. */
function toRuns(rows: Int32Array): Int32Array {
  const runs: number[] = [];
  for (let i = 0; i < rows.length; i++) {
    if (i > 0 && rows[i] === rows[i - 1]! + 1) runs[runs.length - 1]!++;
    else runs.push(rows[i]!, 1);
  }
  return Int32Array.from(runs);
}

/** Copies rows of `source` [numTokens, width] to `target` from element `at` on. Returns the element after the last one. */
function packRows(target: Float32Array, at: number, source: Float32Array, runs: Int32Array, width: number): number {
  let next = at;
  for (let i = 0; i < runs.length; i += 2) {
    const start = runs[i]! * width;
    const length = runs[i + 1]! * width;
    target.set(start === 0 && length === source.length ? source : source.subarray(start, start + length), next);
    next += length;
  }
  return next;
}

class ShardLink {
  readonly shardId: string;
  readonly subject: string;
  readonly queryRows: Int32Array;
  readonly queryRuns: Int32Array;
  readonly kvRuns: Int32Array;
  /** Header, then q, k, v. */
  readonly message: Uint8Array;
  readonly payload: Float32Array;
  readonly header: FrameHeader;
  /** o [numQueryRows, numHeads, headDim], then lse [numQueryRows, numHeads]. */
  readonly partial: Uint8Array;
  readonly output: Float32Array;
  readonly logSumExp: Float32Array;
  readonly assembler = new FrameAssembler();
  hasAnswered = false;

  constructor(part: ShardPart, subject: string, header: FrameHeader, dims: ModelDims) {
    const numQueryRows = part.queryRows.length;
    const numKvRows = part.kvRows.length;
    this.shardId = part.shardId;
    this.subject = subject;
    this.queryRows = part.queryRows;
    this.queryRuns = toRuns(part.queryRows);
    this.kvRuns = toRuns(part.kvRows);
    const bodyBytes = attendBytes({ numQueryRows, numKvRows }, dims.numHeads, dims.numKvHeads, dims.headDim);
    this.message = new Uint8Array(FRAME_HEADER_BYTES + bodyBytes);
    this.payload = new Float32Array(this.message.buffer, FRAME_HEADER_BYTES);
    this.header = { ...header, kind: FRAME_KIND.attend, bodyBytes };
    const outputFloats = numQueryRows * dims.numHeads * dims.headDim;
    this.partial = new Uint8Array(partialBytes(numQueryRows, dims.numHeads, dims.headDim));
    this.output = new Float32Array(this.partial.buffer, 0, outputFloats);
    this.logSumExp = new Float32Array(this.partial.buffer, outputFloats * 4);
  }
}

export class TensorExchange {
  readonly #dims: ModelDims;
  readonly #transport: TensorTransport;
  readonly #lease: Pick<KvLease, 'allows'>;
  readonly #gather: AttentionGather;
  #links: ShardLink[] = [];
  #merged = new Float32Array(0);
  #numTokens = 0;
  #stepId = -1;
  #leaseTerm = -1;
  #layer = -1;
  #numWaiting = 0;
  #resolve: (() => void) | undefined;
  #reject: ((error: LaminaError) => void) | undefined;
  /** A failure that came while nothing was waited for: the next dispatch reports it. */
  #failure: LaminaError | undefined;
  /** performance.now() of the last dispatch; NaN while nothing is waited for. */
  dispatchedAtMs = Number.NaN;

  constructor(dims: ModelDims, transport: TensorTransport, lease: Pick<KvLease, 'allows'>) {
    this.#dims = dims;
    this.#lease = lease;
    this.#transport = transport;
    this.#gather = new AttentionGather(dims.numHeads, dims.headDim);
  }

  /** Sends the plans of a step. `header` carries originId, waveIndex and stepId. */
  begin(
    step: StepRequest,
    header: FrameHeader,
    subjectOf: (shardId: string) => string,
    replySubjectOf: (shardIndex: number) => string,
  ): void {
    this.#numTokens = step.tokenIds.length;
    this.#stepId = step.stepId;
    this.#leaseTerm = step.leaseTerm;
    this.#layer = -1;
    this.#failure = undefined;
    this.#links = step.shards.map((part, shardIndex) => {
      const link = new ShardLink(part, subjectOf(part.shardId), { ...header, shardIndex }, this.#dims);
      const planHeader: FrameHeader = {
        ...header,
        shardIndex,
        kind: FRAME_KIND.plan,
        layer: 0,
        partOffset: 0,
        bodyBytes: part.plan.length - FRAME_HEADER_BYTES,
      };
      writeFrameHeader(part.plan, planHeader);
      for (const frame of splitFrame(part.plan, planHeader, this.#transport.maxPayloadBytes)) {
        this.#transport.publish(link.subject, frame, replySubjectOf(shardIndex));
      }
      return link;
    });
    const width = this.#dims.numHeads * this.#dims.headDim;
    if (!this.#isIdentity() && this.#merged.length < this.#numTokens * width)
      this.#merged = new Float32Array(this.#numTokens * width);
  }

  /** True if one shard has all rows in order: its answer is the attention, without a merge. */
  #isIdentity(): boolean {
    const only = this.#links[0];
    return (
      this.#links.length === 1 &&
      only !== undefined &&
      only.queryRows.length === this.#numTokens &&
      only.queryRuns.length === 2
    );
  }

  /**
   * Sends one layer. The promise resolves when every shard has answered, and rejects when the step fails.
   * @param query [numTokens, numHeads * headDim] float32; `key` and `value` [numTokens, numKvHeads * headDim].
   */
  dispatch(layer: number, query: Float32Array, key: Float32Array, value: Float32Array): Promise<void> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    if (!this.#lease.allows(this.#leaseTerm)) return Promise.reject(leaseEnded());
    const { numHeads, numKvHeads, headDim } = this.#dims;
    this.#layer = layer;
    this.#numWaiting = this.#links.length;
    for (const link of this.#links) {
      let at = packRows(link.payload, 0, query, link.queryRuns, numHeads * headDim);
      at = packRows(link.payload, at, key, link.kvRuns, numKvHeads * headDim);
      packRows(link.payload, at, value, link.kvRuns, numKvHeads * headDim);
      link.header.layer = layer;
      link.hasAnswered = false;
      if (link.message.length <= this.#transport.maxPayloadBytes) {
        writeFrameHeader(link.message, link.header);
        this.#transport.publish(link.subject, link.message);
      } else
        for (const frame of splitFrame(link.message, link.header, this.#transport.maxPayloadBytes))
          this.#transport.publish(link.subject, frame);
    }
    this.dispatchedAtMs = performance.now();
    return new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
  }

  /** Takes a partial of this wave. Returns false if it belongs to nothing that is waited for. */
  receive(frame: Uint8Array, header: FrameHeader): boolean {
    if (header.stepId !== this.#stepId || header.layer !== this.#layer || this.#resolve === undefined) return false;
    const link = this.#links[header.shardIndex];
    if (link === undefined || link.hasAnswered) return false;
    if (header.bodyBytes !== link.partial.length) {
      this.fail(
        new LaminaError(
          'protocol_violation',
          `a shard answers ${header.bodyBytes} bytes where ${link.partial.length} belong`,
        ),
        [link.shardId],
      );
      return true;
    }
    const body = link.assembler.push(frame, header);
    if (body === undefined) return true;
    link.partial.set(body);
    link.hasAnswered = true;
    if (--this.#numWaiting === 0) this.#settle()?.();
    return true;
  }

  /** Nobody listens to what was sent to a shard: it died, or it is about to connect again. */
  shardIsGone(shardIndex: number): void {
    const link = this.#links[shardIndex];
    if (link !== undefined)
      this.fail(new LaminaError('unavailable', `${link.shardId} does not listen`), [link.shardId]);
  }

  /** A shard says that it cannot answer: fails the step it names, if that is in flight. */
  receiveFailure(header: FrameHeader, error: LaminaError): void {
    const link = this.#links[header.shardIndex];
    if (header.stepId === this.#stepId && link !== undefined) this.fail(error, [link.shardId]);
  }

  /**
   * The gathered attention of the dispatched layer, [numTokens, numHeads * headDim] float32, valid until the next one.
   * Call once per layer: sinks are counted here.
   * @throws LaminaError `protocol_violation` when no shard saw a key of some query.
   */
  gathered(): Float32Array {
    if (this.#failure !== undefined) throw this.#failure;
    const sinkLogits = this.#dims.sinkLogits?.[this.#layer];
    if (this.#isIdentity()) {
      const { output, logSumExp } = this.#links[0]!;
      if (sinkLogits !== undefined) applySinks(output, logSumExp, sinkLogits);
      return output;
    }
    const merged = this.#merged.subarray(0, this.#numTokens * this.#dims.numHeads * this.#dims.headDim);
    this.#gather.begin(merged, this.#numTokens);
    for (const link of this.#links) this.#gather.add(link.output, link.logSumExp, link.queryRows);
    const uncovered = this.#gather.finish(sinkLogits);
    if (uncovered >= 0) throw new LaminaError('protocol_violation', `no shard attended query row ${uncovered}`);
    return merged;
  }

  /** Shards of the step in flight that have not answered the dispatched layer. */
  get waitingShardIds(): string[] {
    return this.#resolve === undefined
      ? []
      : this.#links.filter((link) => !link.hasAnswered).map((link) => link.shardId);
  }

  usesShard(shardId: string): boolean {
    return this.#links.some((link) => link.shardId === shardId);
  }

  /** Fails the step in flight; its buffers are dropped. `shardIds` are to blame. */
  fail(error: LaminaError, shardIds: readonly string[]): void {
    const reject = this.#reject;
    this.#settle();
    this.#links = [];
    this.#stepId = -1;
    const failure = new LaminaError(error.code, error.message, { cause: error, diagnostics: { shardIds } });
    if (reject === undefined) this.#failure = failure;
    else reject(failure);
  }

  #settle(): (() => void) | undefined {
    const resolve = this.#resolve;
    this.#resolve = undefined;
    this.#reject = undefined;
    this.dispatchedAtMs = Number.NaN;
    return resolve;
  }
}

function leaseEnded(): LaminaError {
  return new LaminaError(
    'unavailable',
    'the kv-manager has not answered in time; KV must not be written until it does',
  );
}
