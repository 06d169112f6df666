/**
 * Owns driving attention-shards without an executor: this process is their kv-manager and sends them plans and layers, as
 * an executor does, so that attention alone is measured.
 *
 * Invariants
 * 1. KV is written before it is read: memory that was never written would be read from one page of zeros.
 * 2. A layer of a wave is sent when every shard has answered the one before, as in a real step; waves are independent.
 * 3. Answers are counted, and a layer that a shard refuses ends the measurement.
 */
import { vectorOps } from '@lamina/attention-kernel';
import { Bus } from '@lamina/bus';
import {
  ENDPOINTS,
  emptyFrameHeader,
  encodeStepPlan,
  errorBodySchema,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  FrameAssembler,
  type FrameHeader,
  parseMessage,
  readFrameHeader,
  SERVICE_NAMES,
  SUBJECTS,
  splitFrame,
  unpackMessage,
  writeFrameHeader,
} from '@lamina/protocol';
import { attendBytes, BLOCK_FIELDS, elementBytes, type KvLayout, SEGMENT_FIELDS, type StepPlan } from '@lamina/tensor';
import { sleep } from './processes.ts';

const ORIGIN_ID = 1;
const WORKER_ID = 'bench';
const HEARTBEAT_INTERVAL_MS = 5_000;
const READY_TIMEOUT_MS = 60_000;
const FILL_ROWS = 512;
/** More waves in flight than shards are long idle: a quota stops each shard for most of every period. */
const NUM_WAVES = 6;
const FILL_WAVE = NUM_WAVES;

/** What one shard does for a wave. */
interface Link {
  readonly shardId: string;
  readonly shardIndex: number;
  readonly message: Uint8Array;
  readonly plan: Uint8Array;
  readonly header: FrameHeader;
  readonly assembler: FrameAssembler;
  hasAnswered: boolean;
}

interface Wave {
  readonly index: number;
  readonly numRows: number;
  links: Link[];
  layer: number;
  stepId: number;
}

export class AttentionDriver {
  readonly #bus: Bus;
  readonly #layout: KvLayout;
  readonly #shards = new Map<string, number>();
  readonly #waves = new Map<number, Wave>();
  readonly #header = emptyFrameHeader();
  #numSteps = 0;
  #isRunning = false;
  /** A token through one of n layers is an n-th. */
  #tokensDone = 0;
  #failure: Error | undefined;
  #onFilled: (() => void) | undefined;

  private constructor(bus: Bus, layout: KvLayout) {
    this.#bus = bus;
    this.#layout = layout;
  }

  static async start(natsUrl: string, layout: KvLayout): Promise<AttentionDriver> {
    const bus = await Bus.connect(
      { url: natsUrl, name: 'bench', connectTimeoutMs: 5_000 },
      { onError: () => undefined },
    );
    const driver = new AttentionDriver(bus, layout);
    await bus.service.announce({
      name: SERVICE_NAMES['kv-manager'],
      version: '0.0.0',
      description: 'benchmark',
      metadata: {},
      stats: () => null,
    });
    bus.service.serve(ENDPOINTS.shardHeartbeat, ({ shardId, numBlocks }) => {
      if (numBlocks !== null) driver.#shards.set(shardId, numBlocks);
      const counts = { usedBlocks: 0, usedBlocksPeak: 0, fences: [] };
      return { managerEpoch: 'bench', layout, heartbeatIntervalMs: HEARTBEAT_INTERVAL_MS, known: true, ...counts };
    });
    bus.service.serve(ENDPOINTS.shardLeave, () => ({}));
    bus.subscribe(SUBJECTS.workerTensors(WORKER_ID, '*', '*'), ({ data }) => driver.#receive(data));
    return driver;
  }

  /** Shards that have at least `numBlocks`, when there are `count` of them. */
  async shards(count: number, numBlocks: number): Promise<string[]> {
    const deadlineMs = performance.now() + READY_TIMEOUT_MS;
    for (;;) {
      const fit = [...this.#shards].filter(([, blocks]) => blocks >= numBlocks).map(([shardId]) => shardId);
      if (fit.length >= count) return fit.sort();
      if (performance.now() > deadlineMs) throw new Error(`${fit.length} of ${count} shards came`);
      await sleep(100);
    }
  }

  /** Writes random K and V of all layers into blocks [0, numBlocks) of a shard. */
  async fill(shardId: string, numBlocks: number): Promise<void> {
    const { blockSizeTokens } = this.#layout;
    const numSlots = numBlocks * blockSizeTokens;
    for (let slot = 0; slot < numSlots; slot += FILL_ROWS) {
      const numKvRows = Math.min(FILL_ROWS, numSlots - slot);
      const kvSlots = Int32Array.from({ length: numKvRows }, (_, i) => slot + i);
      const none = new Int32Array(0);
      const plan = { numQueryRows: 0, numKvRows, segments: none, blocks: none, kvSlots };
      await new Promise<void>((resolve) => {
        this.#onFilled = resolve;
        this.#begin({ index: FILL_WAVE, numRows: 0, links: [], layer: 0, stepId: 0 }, [{ shardId, plan }]);
      });
      if (this.#failure !== undefined) throw this.#failure;
    }
  }

  /**
   * Attention of `numRequests` requests of `contextTokens` a wave, their blocks spread evenly over the shards; every wave
   * reads the same blocks. @returns tokens per second through all layers.
   */
  async measure(
    shardIds: readonly string[],
    { numRequests, contextTokens, seconds }: { numRequests: number; contextTokens: number; seconds: number },
  ): Promise<number> {
    const parts = shardIds.map((shardId, i) => ({
      shardId,
      plan: this.#decodePlan(i, shardIds.length, numRequests, contextTokens),
    }));
    this.#isRunning = true;
    for (let index = 0; index < NUM_WAVES; index++)
      this.#begin({ index, numRows: numRequests, links: [], layer: 0, stepId: 0 }, parts);
    await sleep(seconds * 250);
    const [tokensBefore, startedMs] = [this.#tokensDone, performance.now()];
    await sleep(seconds * 1000);
    const rate = (1000 * (this.#tokensDone - tokensBefore)) / (performance.now() - startedMs);
    this.#isRunning = false;
    while (this.#waves.size > 0 && this.#failure === undefined) await sleep(20);
    if (this.#failure !== undefined) throw this.#failure;
    return rate;
  }

  async close(): Promise<void> {
    await this.#bus.close();
  }

  /** Shard `shard` of `count` has every count-th block of each request; the newest token's K and V lie on one of them. */
  #decodePlan(shard: number, count: number, numRequests: number, contextTokens: number): StepPlan {
    const { blockSizeTokens } = this.#layout;
    const blocksPerRequest = Math.ceil(contextTokens / blockSizeTokens);
    const segments: number[] = [];
    const blocks: number[] = [];
    const kvSlots: number[] = [];
    let physical = 0;
    for (let request = 0; request < numRequests; request++) {
      const first = blocks.length / BLOCK_FIELDS;
      for (let index = (shard + request) % count; index < blocksPerRequest; index += count) {
        blocks.push(physical, index * blockSizeTokens, blockSizeTokens);
        if (index === blocksPerRequest - 1) kvSlots.push(physical * blockSizeTokens + blockSizeTokens - 1);
        physical++;
      }
      segments.push(request, 1, blocksPerRequest * blockSizeTokens - 1, first, blocks.length / BLOCK_FIELDS - first);
    }
    if (segments.length !== numRequests * SEGMENT_FIELDS) throw new Error('a plan has a segment per request');
    return {
      numQueryRows: numRequests,
      numKvRows: kvSlots.length,
      segments: Int32Array.from(segments),
      blocks: Int32Array.from(blocks),
      kvSlots: Int32Array.from(kvSlots),
    };
  }

  /** Sends the plans of a step and its first layer. */
  #begin(wave: Wave, parts: readonly { readonly shardId: string; readonly plan: StepPlan }[]): void {
    const { kvDtype } = this.#layout;
    const { toHalves } = vectorOps();
    wave.links = parts.map(({ shardId, plan }, shardIndex) => {
      const bodyBytes = attendBytes(plan, this.#layout);
      const message = new Uint8Array(FRAME_HEADER_BYTES + bodyBytes);
      const floats = Float32Array.from(
        { length: bodyBytes / elementBytes(kvDtype) },
        (_, i) => ((i * 7919) % 1009) / 1009 - 0.5,
      );
      if (kvDtype === 'f32') message.set(new Uint8Array(floats.buffer), FRAME_HEADER_BYTES);
      else toHalves(floats, 0, floats.length, new Uint16Array(message.buffer, FRAME_HEADER_BYTES), 0);
      const header: FrameHeader = {
        kind: FRAME_KIND.attend,
        layer: 0,
        stepId: 0,
        waveIndex: wave.index,
        shardIndex,
        bodyBytes,
        partOffset: 0,
        originId: ORIGIN_ID,
        isBodyChecked: false,
      };
      const encoded = encodeStepPlan(plan);
      return {
        shardId,
        shardIndex,
        message,
        plan: encoded,
        header,
        assembler: new FrameAssembler(),
        hasAnswered: false,
      };
    });
    this.#waves.set(wave.index, wave);
    this.#startStep(wave);
  }

  #startStep(wave: Wave): void {
    wave.stepId = ++this.#numSteps;
    wave.layer = 0;
    for (const link of wave.links) {
      link.header.stepId = wave.stepId;
      const bodyBytes = link.plan.length - FRAME_HEADER_BYTES;
      const header = { ...link.header, kind: FRAME_KIND.plan, layer: 0, bodyBytes };
      const reply = SUBJECTS.workerTensors(WORKER_ID, wave.index, link.shardIndex);
      this.#send(link.shardId, link.plan, header, reply);
    }
    this.#sendLayer(wave);
  }

  #sendLayer(wave: Wave): void {
    for (const link of wave.links) {
      link.header.layer = wave.layer;
      link.hasAnswered = false;
      this.#send(link.shardId, link.message, link.header);
    }
  }

  #send(shardId: string, message: Uint8Array, header: FrameHeader, reply?: string): void {
    writeFrameHeader(message, header);
    for (const frame of splitFrame(message, header, this.#bus.maxPayloadBytes))
      this.#bus.publish(SUBJECTS.shardTensors(shardId), frame, reply);
  }

  #receive(data: Uint8Array): void {
    if (data.length === 0) {
      this.#fail(new Error('a shard went away'));
      return;
    }
    const header = this.#header;
    readFrameHeader(data, header);
    if (header.kind === FRAME_KIND.failure) {
      const body = unpackMessage(data.subarray(FRAME_HEADER_BYTES));
      this.#fail(new Error(`a shard refused: ${parseMessage('failure', errorBodySchema, body).message}`));
      return;
    }
    const wave = this.#waves.get(header.waveIndex);
    const link = wave?.links[header.shardIndex];
    if (wave === undefined || link === undefined || header.stepId !== wave.stepId || header.layer !== wave.layer)
      return;
    if (link.assembler.push(data, header) === undefined) return;
    link.hasAnswered = true;
    if (wave.links.every(({ hasAnswered }) => hasAnswered)) this.#advance(wave);
  }

  #advance(wave: Wave): void {
    wave.layer++;
    this.#tokensDone += wave.numRows / this.#layout.numLayers;
    if (wave.layer < this.#layout.numLayers) {
      this.#sendLayer(wave);
      return;
    }
    if (wave.index === FILL_WAVE) {
      this.#waves.delete(wave.index);
      this.#onFilled?.();
      return;
    }
    if (this.#isRunning) this.#startStep(wave);
    else this.#waves.delete(wave.index);
  }

  #fail(error: Error): void {
    this.#failure ??= error;
    this.#onFilled?.();
  }
}
