/**
 * Owns the tensor plane of a shard: plans and layers in, partial outputs and failures out.
 *
 * Invariants
 * 1. The path of a layer finds its step by two accesses, makes no promise, logs nothing and copies nothing: the kernel
 *    reads the received chunk and writes behind the header of the answer.
 * 2. Whatever comes in, the plane goes on: a frame that cannot be used is counted, and answered with a failure where
 *    the sender is known.
 * 3. A layer that is in flight or answered is not started again; another one while one is in flight is a violation.
 * 4. A plan that comes again, or after a later one of its wave, changes nothing.
 * 5. Once its first layer has been answered a step is armed: its brief layers are answered where they arrive, and come here no
 *    more. What is unusual about a frame comes here.
 * 6. Layers are not answered anew, and one that was lost with the connection never comes: after that every origin is told, and
 *    runs the steps that it has in flight again.
 * 7. When `fence` has returned true, nothing of those origins is written to KV any more.
 */
import type { AttentionKernel, LayerFrames } from '@lamina/attention-kernel';
import { isForbiddenReply, type LinkMessage, type TensorLink } from '@lamina/bus';
import {
  decodeStepPlan,
  emptyFrameHeader,
  errorBodyOf,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  FrameAssembler,
  type FrameHeader,
  packMessage,
  readFrameHeader,
  SUBJECTS,
  splitFrame,
  writeFrameHeader,
} from '@lamina/protocol';
import type { Logger } from '@lamina/runtime';
import { asLaminaError, kvBytesPerToken, LaminaError } from '@lamina/tensor';
import { Origins } from './origins.ts';
import type { ShardStats } from './shard-stats.ts';
import { WaveStep } from './wave.ts';

export interface TensorPlaneOptions {
  readonly kernel: AttentionKernel;
  readonly link: Pick<TensorLink, 'publish' | 'maxPayloadBytes'>;
  readonly log: Logger;
  readonly stats: ShardStats;
  /** Of the kernel, if the link asks its handler. */
  readonly frames: LayerFrames | undefined;
}

/** One message as it came: `reply` is read from plans only, and held is what the kernel reads later. */
export type PlaneMessage = Pick<LinkMessage, 'data' | 'reply' | 'hold'>;

const MAX_PLAN_BYTES = 64 * 1024 * 1024;
const ORIGIN_IDLE_MS = 600_000;
/** Origins whose plans may come split at a time. */
const MAX_SPLIT_PLANS = 32;
/** Failures of one kind in a row are logged at most this often. */
const LOG_INTERVAL_MS = 1000;

export class TensorPlane {
  readonly #kernel: AttentionKernel;
  readonly #link: TensorPlaneOptions['link'];
  readonly #log: Logger;
  readonly #stats: ShardStats;
  readonly #bytesPerTokenLayer: number;
  readonly #frames: LayerFrames | undefined;
  readonly #origins = new Origins((step) => this.#endStep(step));
  /** Plans that come split, by origin: a sender does not interleave messages. Bounded, oldest first. */
  readonly #planAssemblers = new Map<number, FrameAssembler>();
  /** Of the frame that is being handled. */
  readonly #header: FrameHeader = emptyFrameHeader();
  readonly #onDone = (step: WaveStep, error: Error | null): void => this.#finish(step, error);
  #loggedAtMs = Number.NEGATIVE_INFINITY;
  #isClosing = false;

  constructor(options: TensorPlaneOptions) {
    this.#kernel = options.kernel;
    this.#link = options.link;
    this.#log = options.log;
    this.#stats = options.stats;
    this.#frames = options.frames;
    this.#stats.onRead = () => this.#tell();
    this.#bytesPerTokenLayer = kvBytesPerToken(options.kernel.layout) / options.kernel.layout.numLayers;
  }

  onMessage(message: PlaneMessage): void {
    const header = this.#header;
    const { data } = message;
    try {
      readFrameHeader(data, header);
    } catch (cause) {
      this.#refuseUnread(header, replyOf(message), cause);
      return;
    }
    const step = this.#origins.find(header.originId, header.waveIndex);
    try {
      if (this.#isClosing) throw new LaminaError('unavailable', 'this shard gives its memory up');
      if (header.kind === FRAME_KIND.attend) this.#attend(message, data, header, step);
      else if (header.kind === FRAME_KIND.plan) this.#plan(data, header, replyOf(message));
      else throw new LaminaError('protocol_violation', `a shard takes plans and layers, not kind ${header.kind}`);
    } catch (cause) {
      this.#refuse(header, step?.replySubject ?? replyOf(message), cause);
    }
  }

  /** Forgets origins that went away. Call now and then. */
  dropIdle(): void {
    this.#tell();
    this.#origins.dropIdle(performance.now(), ORIGIN_IDLE_MS);
  }

  /**
   * Takes no more plans and layers from these origins.
   * @returns Whether none of their layers is in the kernel either: if not, call again.
   */
  fence(originIds: readonly number[]): boolean {
    this.#origins.fence(originIds);
    return !this.#origins.isFencedInFlight;
  }

  /** The connection was cut and is there again: what was on its way, in either direction, may be lost. KV is not. */
  connectionCut(): void {
    const error = new LaminaError('unavailable', 'the connection of a shard was cut', { retryAfterMs: 0 });
    for (const { header, replySubject } of this.#origins.oneOfEach()) this.#sendFailure(header, replySubject, error);
  }

  /** Takes no more frames; layers in flight are still answered. Waits for them and closes the kernel. */
  async close(): Promise<void> {
    this.#isClosing = true;
    await this.#kernel.close();
    this.#tell();
    this.#origins.clear();
  }

  #attend(message: PlaneMessage, frame: Uint8Array, header: FrameHeader, step: WaveStep | undefined): void {
    const { layer } = header;
    if (step === undefined || step.stepId !== header.stepId) throw unknownStep(header, step);
    if (layer <= step.layerAnswered) return;
    if (step.layerInFlight >= 0) {
      if (step.layerInFlight === layer) return;
      throw new LaminaError('protocol_violation', `layer ${layer} came while layer ${step.layerInFlight} is in flight`);
    }
    if (header.shardIndex !== step.header.shardIndex)
      throw new LaminaError(
        'protocol_violation',
        `layer ${layer} is for shard ${header.shardIndex} of its step, not this one`,
      );
    if (header.bodyBytes !== step.attendBytes)
      throw new LaminaError(
        'protocol_violation',
        `layer ${layer} has ${header.bodyBytes} bytes of q, k and v; its plan needs ${step.attendBytes}`,
      );
    const body = step.memory.assembler.push(frame, header);
    if (body === undefined) return;
    step.header.isBodyChecked = header.isBodyChecked;
    step.receivedAtMs = performance.now();
    step.layerInFlight = layer;
    this.#stats.queueDepth++;
    try {
      this.#kernel.attend(step.kernelStep, layer, body, step.partial, step.onDone);
      // Not brief: the kernel reads it from other threads.
      if (step.layerInFlight === layer && body.buffer === frame.buffer) step.heldMemory = message.hold?.();
    } catch (cause) {
      // Brief attention has ended by now, and it is its answer that could not be published.
      if (step.layerInFlight === layer) {
        this.#stats.queueDepth--;
        step.layerInFlight = -1;
      }
      throw cause;
    }
  }

  #finish(step: WaveStep, error: Error | null): void {
    const stats = this.#stats;
    stats.queueDepth--;
    step.header.layer = step.layerInFlight;
    step.endLayer(error === null);
    if (step.isEnded) {
      this.#origins.finished(step);
      return;
    }
    if (error !== null) {
      this.#refuse(step.header, step.replySubject, error);
      return;
    }
    const { answer } = step;
    writeFrameHeader(answer, step.header);
    this.#send(step.replySubject, answer, step.header);
    this.#arm(step);
    const seconds = (performance.now() - step.receivedAtMs) / 1000;
    const numKvTokens = step.numKvTokensOf(step.header.layer);
    stats.attended(step.numQueryRows, numKvTokens, numKvTokens * this.#bytesPerTokenLayer, seconds);
  }

  /** Steps whose frames have checksums of their tensors stay with us. */
  #arm(step: WaveStep): void {
    const { answer, header } = step;
    if (step.isArmed || this.#frames === undefined) return;
    step.isArmed = true;
    if (header.isBodyChecked) return;
    const expectedHeader = new Uint8Array(FRAME_HEADER_BYTES);
    writeFrameHeader(expectedHeader, { ...header, kind: FRAME_KIND.attend, bodyBytes: step.attendBytes });
    const kvTokens = Float64Array.from({ length: this.#kernel.layout.numLayers }, (_, layer) =>
      step.numKvTokensOf(layer),
    );
    const { state, replySubject: reply } = step;
    this.#frames.arm(step.kernelStep, { expectedHeader, answer, reply, state, kvTokens });
  }

  /** Counts what was answered without us. */
  #tell(): void {
    const counts = this.#frames?.take();
    if (counts !== undefined && counts.attends > 0)
      this.#stats.answered(counts, counts.kvTokens * this.#bytesPerTokenLayer);
  }

  #plan(frame: Uint8Array, header: FrameHeader, reply: string | undefined): void {
    if (reply === undefined)
      throw new LaminaError(
        'protocol_violation',
        'a plan must name the inbox of a worker for its partial outputs as its reply',
      );
    if (header.bodyBytes > MAX_PLAN_BYTES)
      throw new LaminaError(
        'protocol_violation',
        `a plan of ${header.bodyBytes} bytes; at most ${MAX_PLAN_BYTES} are taken`,
      );
    const body = this.#joinPlan(frame, header);
    if (body === undefined) return;
    const current = this.#origins.find(header.originId, header.waveIndex);
    // Step ids count up and wrap at 32 bits.
    if (current !== undefined && ((header.stepId - current.stepId) | 0) <= 0) return;
    const plan = decodeStepPlan(body);
    this.#origins.replace(
      header.originId,
      header.waveIndex,
      this.#kernel.layout.numLayers,
      performance.now(),
      (memory) => new WaveStep(this.#kernel, plan, header, reply, memory, this.#onDone),
    );
  }

  /** The body of a plan, when it is complete. */
  #joinPlan(frame: Uint8Array, header: FrameHeader): Uint8Array | undefined {
    if (frame.length - FRAME_HEADER_BYTES === header.bodyBytes) return frame.subarray(FRAME_HEADER_BYTES);
    let assembler = this.#planAssemblers.get(header.originId);
    if (assembler === undefined) {
      assembler = new FrameAssembler();
      for (const oldest of this.#planAssemblers.keys()) {
        if (this.#planAssemblers.size < MAX_SPLIT_PLANS) break;
        this.#planAssemblers.delete(oldest);
      }
      this.#planAssemblers.set(header.originId, assembler);
    }
    return assembler.push(frame, header);
  }

  #endStep(step: WaveStep): void {
    step.isEnded = true;
    // Layers in flight still finish; theirs is the last reference to the memory.
    this.#kernel.endStep(step.kernelStep);
  }

  #send(subject: string, message: Uint8Array, header: FrameHeader): void {
    const link = this.#link;
    const { maxPayloadBytes } = link;
    if (message.length <= maxPayloadBytes) link.publish(subject, message);
    else for (const frame of splitFrame(message, header, maxPayloadBytes)) link.publish(subject, frame);
  }

  /** A frame that was damaged on its way is refused to the step that it seems to belong to, which then runs again at once. */
  #refuseUnread(header: FrameHeader, reply: string | undefined, cause: unknown): void {
    const step = header.kind === FRAME_KIND.attend ? this.#origins.find(header.originId, header.waveIndex) : undefined;
    if (step !== undefined && step.stepId === header.stepId) this.#refuse(step.header, step.replySubject, cause);
    else this.#refuse(header.kind === FRAME_KIND.plan ? header : emptyFrameHeader(), reply, cause);
  }

  #refuse(header: FrameHeader, replySubject: string | undefined, cause: unknown): void {
    const error = asLaminaError(cause);
    this.#stats.failures++;
    const nowMs = performance.now();
    if (nowMs - this.#loggedAtMs >= LOG_INTERVAL_MS) {
      this.#loggedAtMs = nowMs;
      const { originId, waveIndex, stepId, layer } = header;
      this.#log.warn({ err: error, originId, waveIndex, stepId, layer }, 'tensor frame refused');
    }
    if (replySubject !== undefined) this.#sendFailure(header, replySubject, error);
  }

  #sendFailure(header: FrameHeader, replySubject: string, error: LaminaError): void {
    const body = packMessage(errorBodyOf(error));
    const message = new Uint8Array(FRAME_HEADER_BYTES + body.length);
    message.set(body, FRAME_HEADER_BYTES);
    const failure: FrameHeader = { ...header, kind: FRAME_KIND.failure, bodyBytes: body.length, partOffset: 0 };
    writeFrameHeader(message, failure);
    this.#send(replySubject, message, failure);
  }
}

const WORKER_SUBJECTS = SUBJECTS.workerTensors('', '', '').replace(/\.+$/, '.');

/** Where a message may be answered: whoever sends it must not have this process publish where only services do. */
function replyOf({ reply }: PlaneMessage): string | undefined {
  return isForbiddenReply(reply) && reply?.startsWith(WORKER_SUBJECTS) !== true ? undefined : reply;
}

function unknownStep(header: FrameHeader, step: WaveStep | undefined): LaminaError {
  const known = step === undefined ? 'no plan of this wave is known' : `the wave's plan is of step ${step.stepId}`;
  return new LaminaError('protocol_violation', `layer ${header.layer} of step ${header.stepId}: ${known}`);
}
