/**
 * Owns one step of one wave on this shard, and the memory that its layers pass through.
 *
 * Invariants
 * 1. A wave has at most one layer in flight, so one memory serves all layers of a step. It is free for the next layer:
 *    what is published is copied or sent at once by the native link, in a microtask by nats.js, and the executor's next message
 *    cannot come before the answer to this one has left. While the connection is down nats.js keeps views instead, but then
 *    nothing comes in either. The executor may have given the step up before:
 *    its next one can then come in the same chunk as the last layer, so steps that follow each other take turns.
 * 2. The memory goes on to the next step only when the last layer of this one has been answered. A step that was
 *    abandoned keeps its memory until its job is done; the next step gets new memory.
 * 3. Nothing is allocated per layer.
 */

import { type AttentionKernel, type KernelStep, newStepState, STEP_STATE } from '@lamina/attention-kernel';
import type { HeldMemory } from '@lamina/bus';
import { emptyFrameHeader, FRAME_HEADER_BYTES, FRAME_KIND, FrameAssembler, type FrameHeader } from '@lamina/protocol';
import { attendBytes, BLOCK_FIELDS, partialBytes, SEGMENT_FIELDS, type StepPlan } from '@lamina/tensor';

/** What a step's layers pass through: parts of a message that came split, and the answer with its header in front. */
export class WaveMemory {
  readonly assembler = new FrameAssembler();
  readonly #bytes = [new Uint8Array(0), new Uint8Array(0)];
  #turn = 0;

  /** Memory of `numBytes` for the answers of a step: that of the step before the last one, while it is large enough. */
  answer(numBytes: number): Uint8Array {
    this.#turn ^= 1;
    if (this.#bytes[this.#turn]!.length < numBytes) this.#bytes[this.#turn] = new Uint8Array(numBytes);
    return this.#bytes[this.#turn]!.subarray(0, numBytes);
  }
}

export class WaveStep {
  readonly memory: WaveMemory;
  readonly kernelStep: KernelStep;
  readonly stepId: number;
  /** Where partial outputs go. */
  readonly replySubject: string;
  /** Bytes of q, k and v of one layer. */
  readonly attendBytes: number;
  readonly numQueryRows: number;
  /** By window: KV tokens that the queries of a layer see on this shard. */
  readonly #numKvTokens = new Map<number, number>();
  readonly #windowTokens: readonly number[] | undefined;
  /** Called by the kernel; made once per step. */
  readonly onDone: (error: Error | null) => void;
  /** Header of the next answer: the plan's, with the layer in flight. */
  readonly header: FrameHeader = emptyFrameHeader();
  /** STEP_STATE: the kernel, where it answers frames natively, sees it and goes on from it. */
  readonly state = newStepState();
  receivedAtMs = 0;
  /** Where q, k and v of the layer in flight lie. */
  heldMemory: HeldMemory | undefined;
  /** Set when another plan took its place, or the origin went away. */
  isEnded = false;
  /** Its frames may be answered natively from now on. */
  isArmed = false;
  readonly #answerBytes: number;
  #answer: Uint8Array | undefined;
  #partial: Uint8Array | undefined;

  constructor(
    kernel: AttentionKernel,
    plan: StepPlan,
    planHeader: FrameHeader,
    replySubject: string,
    memory: WaveMemory,
    onDone: (step: WaveStep, error: Error | null) => void,
  ) {
    this.kernelStep = kernel.beginStep(plan);
    this.memory = memory;
    this.stepId = planHeader.stepId;
    this.replySubject = replySubject;
    this.attendBytes = attendBytes(plan, kernel.layout);
    this.numQueryRows = plan.numQueryRows;
    this.#windowTokens = kernel.layout.windowTokens;
    for (const window of new Set(this.#windowTokens ?? [0])) this.#numKvTokens.set(window, countKvTokens(plan, window));
    this.onDone = (error) => onDone(this, error);
    const bodyBytes = partialBytes(plan.numQueryRows, kernel.layout);
    this.#answerBytes = FRAME_HEADER_BYTES + bodyBytes;
    Object.assign(this.header, planHeader, { kind: FRAME_KIND.partial, bodyBytes, partOffset: 0 });
  }

  /** Header and partial output in one buffer. Made at the first layer: a plan alone must not cost memory. */
  get answer(): Uint8Array {
    this.#answer ??= this.memory.answer(this.#answerBytes);
    return this.#answer;
  }

  /** Where the kernel writes: o, then lse. */
  get partial(): Uint8Array {
    this.#partial ??= this.answer.subarray(FRAME_HEADER_BYTES);
    return this.#partial;
  }

  /** KV tokens in the blocks that a layer reads. */
  numKvTokensOf(layer: number): number {
    return this.#numKvTokens.get(this.#windowTokens?.[layer] ?? 0) ?? 0;
  }

  /** The last layer that was answered; layers come in order. */
  get layerAnswered(): number {
    return this.state[STEP_STATE.layerAnswered]!;
  }

  /** -1 when none is. */
  get layerInFlight(): number {
    return this.state[STEP_STATE.layerInFlight]!;
  }

  set layerInFlight(layer: number) {
    this.state[STEP_STATE.layerInFlight] = layer;
  }

  endLayer(isAnswered: boolean): void {
    if (isAnswered) this.state[STEP_STATE.layerAnswered] = this.layerInFlight;
    this.layerInFlight = -1;
    this.heldMemory?.release();
    this.heldMemory = undefined;
  }

  /** Memory for the step that takes this one's place. */
  memoryForNext(numLayers: number): WaveMemory {
    return this.layerInFlight < 0 && this.layerAnswered === numLayers - 1 ? this.memory : new WaveMemory();
  }
}

/** The plan has been checked: the blocks of a segment are in the order of their positions. */
function countKvTokens(plan: StepPlan, windowTokens: number): number {
  const { segments, blocks } = plan;
  let numTokens = 0;
  for (let i = 0; i < segments.length; i += SEGMENT_FIELDS) {
    const firstBlock = segments[i + 3]! * BLOCK_FIELDS;
    const oldest = windowTokens === 0 ? 0 : segments[i + 2]! - windowTokens + 1;
    // From the newest block back, so that a window costs what it holds.
    for (let at = firstBlock + (segments[i + 4]! - 1) * BLOCK_FIELDS; at >= firstBlock; at -= BLOCK_FIELDS) {
      const numBlockTokens = blocks[at + 2]!;
      if (blocks[at + 1]! + numBlockTokens > oldest) numTokens += numBlockTokens;
      else if (numBlockTokens > 0) break;
    }
  }
  return numTokens;
}
