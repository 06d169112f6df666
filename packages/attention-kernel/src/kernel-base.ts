/**
 * Owns what both kernels share: the life of a kernel and its steps, the checks before work starts, the FIFO of attends
 * in flight. A subclass only starts attends and reports them finished.
 *
 * Invariants
 * 1. Nothing is started after close() or with a step that has ended or belongs to another kernel.
 * 2. qkv, out and done are held here from attend until done: nobody else needs to keep them alive.
 * 3. The slab is freed only when nothing is in flight.
 */
import { type KvLayout, LaminaError, type StepPlan } from '@lamina/tensor';
import type { AttentionKernel, KernelName, KernelStep, LayerFrames } from './kernel.ts';
import { type CheckedPlan, checkAttend, checkPlan } from './plan-check.ts';

export class Step<State> implements KernelStep {
  readonly plan: StepPlan;
  readonly checked: CheckedPlan;
  readonly owner: object;
  /** What the kernel keeps per step; null once the step has ended. */
  state: State | null;

  constructor(plan: StepPlan, checked: CheckedPlan, owner: object, state: State) {
    this.plan = plan;
    this.checked = checked;
    this.owner = owner;
    this.state = state;
  }
}

/** One attend in flight. */
export interface PendingAttend<State> {
  readonly id: number;
  readonly state: State;
  readonly checked: CheckedPlan;
  readonly layer: number;
  readonly qkv: Uint8Array;
  readonly out: Uint8Array;
  readonly done: (error: Error | null) => void;
}

/** Ids wrap below 2^31, far above any number of attends in flight. */
const MAX_ID = 2 ** 31 - 1;

export abstract class KernelBase<State> implements AttentionKernel {
  abstract readonly name: KernelName;
  readonly frames: LayerFrames | undefined = undefined;
  readonly layout: KvLayout;
  readonly numBlocks: number;
  readonly #pending = new Map<number, PendingAttend<State>>();
  #nextId = 0;
  #closing: Promise<void> | null = null;
  #onIdle: (() => void) | null = null;

  constructor(layout: KvLayout, numBlocks: number) {
    this.layout = layout;
    this.numBlocks = numBlocks;
  }

  /** Makes the kernel's own state of a step. */
  protected abstract makeState(checked: CheckedPlan): State;
  /** Returns true when it is done already; else must lead to exactly one finish(id), later. */
  protected abstract start(attend: PendingAttend<State>): boolean;
  protected abstract release(state: State): void;
  /** Frees everything; nothing is in flight. */
  protected abstract free(): void;

  beginStep(plan: StepPlan): KernelStep {
    this.#checkOpen();
    const checked = checkPlan(plan, this.layout, this.numBlocks);
    return new Step(plan, checked, this, this.makeState(checked));
  }

  attend(step: KernelStep, layer: number, qkv: Uint8Array, out: Uint8Array, done: (error: Error | null) => void): void {
    this.#checkOpen();
    const { checked } = this.#own(step);
    const state = this.stateOf(step);
    checkAttend(checked, this.layout, layer, qkv, out);
    const id = this.#nextId;
    this.#nextId = id === MAX_ID ? 0 : id + 1;
    const pending: PendingAttend<State> = { id, state, checked, layer, qkv, out, done };
    this.#pending.set(id, pending);
    let isDone: boolean;
    try {
      isDone = this.start(pending);
    } catch (error) {
      this.#pending.delete(id);
      throw error;
    }
    if (isDone) this.finish(id, null);
  }

  endStep(step: KernelStep): void {
    const own = this.#own(step);
    if (own.state === null) throw new LaminaError('internal', 'endStep: the step has already ended');
    const { state } = own;
    own.state = null;
    if (this.#closing === null) this.release(state);
  }

  close(): Promise<void> {
    if (this.#closing === null) {
      const idle =
        this.#pending.size === 0
          ? Promise.resolve()
          : new Promise<void>((resolve) => {
              this.#onIdle = resolve;
            });
      this.#closing = idle.then(() => this.free());
    }
    return this.#closing;
  }

  /** On the event loop, once per start(): by attend() when that returned true, else by the subclass. */
  protected finish(id: number, error: Error | null): void {
    const pending = this.#pending.get(id);
    if (pending === undefined) throw new LaminaError('internal', `attend ${id} finished twice`);
    this.#pending.delete(id);
    if (this.#pending.size === 0) this.#onIdle?.();
    pending.done(error);
  }

  /** @throws LaminaError `internal` when the step has ended, or is another kernel's. */
  protected stateOf(step: KernelStep): State {
    const { state } = this.#own(step);
    if (state === null) throw new LaminaError('internal', 'the step has ended');
    return state;
  }

  #checkOpen(): void {
    if (this.#closing !== null) throw new LaminaError('internal', 'the attention kernel is closed');
  }

  #own(step: KernelStep): Step<State> {
    if (!this.#isOwn(step)) throw new LaminaError('internal', 'the step belongs to another attention kernel');
    return step;
  }

  #isOwn(step: KernelStep): step is Step<State> {
    return step instanceof Step && step.owner === this;
  }
}
