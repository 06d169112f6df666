/**
 * Owns an executor for tests of who may write KV: registered with a real kv-manager, and on the tensor plane of real shards
 * by hand, one block and one layer at a time.
 */
import type { Bus } from '@lamina/bus';
import {
  type BlockRef,
  ENDPOINTS,
  emptyFrameHeader,
  encodeStepPlan,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  type FrameHeader,
  readFrameHeader,
  SUBJECTS,
  writeFrameHeader,
} from '@lamina/protocol';
import { type AttentionSpec, attendBytes, type StepPlan } from '@lamina/tensor';
import { expect } from 'vitest';
import { eventually } from './in-process.ts';

export interface FakeModel {
  readonly modelId: string;
  readonly spec: AttentionSpec;
  readonly blockSizeTokens: number;
}

const TIMEOUT = { timeoutMs: 1000 };
const NUM_PROMPT_TOKENS = 5;

/** An executor of one worker: registered, and on the tensor plane under an origin id. */
export class FakeExecutor {
  readonly #bus: Bus;
  readonly #model: FakeModel;
  readonly executorId: string;
  originId: number;
  readonly answers: { header: FrameHeader; body: Uint8Array }[] = [];
  readonly #reply: string;
  #beats: NodeJS.Timeout | undefined;

  constructor(bus: Bus, model: FakeModel, executorId: string, originId: number) {
    this.#bus = bus;
    this.#model = model;
    this.executorId = executorId;
    this.originId = originId;
    this.#reply = SUBJECTS.workerTensors(`${executorId}-0`, 0, 0);
    bus.subscribe(this.#reply, ({ data }) => {
      const header = emptyFrameHeader();
      readFrameHeader(data, header);
      this.answers.push({ header, body: data.slice(FRAME_HEADER_BYTES) });
    });
  }

  beat() {
    const { executorId, originId } = this;
    const { modelId, spec } = this.#model;
    const body = { executorId, modelId, spec, originIds: [originId] };
    return this.#bus.request(ENDPOINTS.executorHeartbeat, body, TIMEOUT);
  }

  keepBeating(intervalMs: number): void {
    this.#beats = setInterval(() => void this.beat().catch(() => undefined), intervalMs);
  }

  /** No more signs of life; nothing is said. */
  cutOff(): void {
    clearInterval(this.#beats);
  }

  /** One block. */
  async allocate(): Promise<BlockRef> {
    const { executorId } = this;
    const numTokens = this.#model.blockSizeTokens;
    const body = { requestId: executorId, executorId, numTokens, maxTokens: numTokens, deliveryCount: 1 };
    return (await this.#bus.request(ENDPOINTS.allocate, body, TIMEOUT)).blocks[0]!;
  }

  /** Allocates the one block of the cluster as soon as it is to be had. */
  allocateSoon(): Promise<BlockRef> {
    return eventually(() => this.allocate().catch(() => undefined));
  }

  sendPlan({ shardId }: BlockRef, stepId: number, plan: StepPlan): void {
    this.#send(shardId, encodeStepPlan(plan), { kind: FRAME_KIND.plan, stepId });
  }

  sendLayer({ shardId }: BlockRef, stepId: number, plan: StepPlan, value: number): void {
    const bodyBytes = attendBytes(plan, { ...this.#model.spec, kvDtype: 'f32' });
    const message = new Uint8Array(FRAME_HEADER_BYTES + bodyBytes);
    const qkv = new Float32Array(message.buffer, FRAME_HEADER_BYTES);
    for (let i = 0; i < qkv.length; i++) qkv[i] = Math.sin(value * (i + 1));
    this.#send(shardId, message, { kind: FRAME_KIND.attend, stepId });
  }

  #send(shardId: string, message: Uint8Array, header: Partial<FrameHeader>): void {
    const bodyBytes = message.length - FRAME_HEADER_BYTES;
    writeFrameHeader(message, { ...emptyFrameHeader(), originId: this.originId, bodyBytes, ...header });
    this.#bus.publish(SUBJECTS.shardTensors(shardId), message, this.#reply);
  }

  /** Runs layer 0 of a step, and returns the partial output. */
  async run(ref: BlockRef, stepId: number, plan: StepPlan, value: number): Promise<Uint8Array> {
    this.sendPlan(ref, stepId, plan);
    this.sendLayer(ref, stepId, plan, value);
    const { header, body } = await eventually(() => this.answers.find((answer) => answer.header.stepId === stepId));
    expect(header.kind).toBe(FRAME_KIND.partial);
    return body;
  }
}

/** The first tokens of a block, and the one after them. */
export function plansOf({ block }: BlockRef, blockSizeTokens: number): { prefill: StepPlan; decode: StepPlan } {
  const slot = block * blockSizeTokens;
  const numTokens = NUM_PROMPT_TOKENS;
  return {
    prefill: {
      numQueryRows: numTokens,
      numKvRows: numTokens,
      segments: Int32Array.of(0, numTokens, 0, 0, 1),
      blocks: Int32Array.of(block, 0, numTokens),
      kvSlots: Int32Array.from({ length: numTokens }, (_, token) => slot + token),
    },
    decode: {
      numQueryRows: 1,
      numKvRows: 1,
      segments: Int32Array.of(0, 1, numTokens, 0, 1),
      blocks: Int32Array.of(block, 0, numTokens + 1),
      kvSlots: Int32Array.of(slot + numTokens),
    },
  };
}
