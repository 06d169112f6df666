/**
 * Owns the JetStream streams: their limits, and creating or adjusting them at start.
 *
 * Invariants
 * 1. Every stream is bounded in messages or bytes.
 * 2. Any service may create a stream first; all ask for the same configuration, but for the key of LAMINA_WORK (work-key.ts),
 *    which the first one chooses.
 * 3. Nobody purges a stream or deletes a message of it, services included (NO_REMOVAL); messages go by age, by limits, or,
 *    in work queues, with their acknowledgement. An existing stream gets this by update; it cannot be taken back.
 */
import { STREAMS } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import {
  AckPolicy,
  DiscardPolicy,
  type JetStreamManager,
  nanos,
  RetentionPolicy,
  StorageType,
  type StreamConfig,
} from 'nats';
import type { Bus } from './bus.ts';
import type { DurableQueue } from './durable-pull.ts';
import { isRefusedWith } from './jetstream-codes.ts';
import { streamManager } from './stream-manager.ts';
import { workSubjects } from './work-key.ts';

/** An executor renews its leases well within this time; a lease that lapses is given to another executor. */
export const ACK_WAIT_MS = 4_000;

/** A gateway that has a prompt in hand says so well within this time; a dead one's prompts are offered to another after it. */
export const PROMPT_ACK_WAIT_MS = 5_000;

/**
 * nats-server confirms a stored message on whatever subject its publisher chose as the reply, and asks no permission for
 * that: the confirmation would do as a purge or as the removal of a message.
 */
const NO_REMOVAL = { deny_purge: true, deny_delete: true } as const;

/** Full means that the publisher is refused: what was acknowledged is never pushed out by what comes later. */
const PROMPTS_CONFIG = {
  ...NO_REMOVAL,
  name: STREAMS.prompts.name,
  retention: RetentionPolicy.Workqueue,
  storage: StorageType.File,
  discard: DiscardPolicy.New,
  max_age: nanos(7 * 24 * 60 * 60 * 1000),
  max_msgs: 100_000,
  max_bytes: 512 * 1024 * 1024,
  duplicate_window: nanos(2 * 60 * 1000),
} satisfies Partial<StreamConfig>;

const WORK_CONFIG = {
  ...NO_REMOVAL,
  name: STREAMS.work.name,
  retention: RetentionPolicy.Workqueue,
  storage: StorageType.File,
  discard: DiscardPolicy.New,
  max_msgs: 10_000,
  max_bytes: 512 * 1024 * 1024,
} satisfies Partial<StreamConfig>;

const TOKENS_CONFIG = {
  ...NO_REMOVAL,
  name: STREAMS.tokens.name,
  retention: RetentionPolicy.Limits,
  storage: StorageType.File,
  discard: DiscardPolicy.Old,
  max_age: nanos(60 * 60 * 1000),
  max_bytes: 512 * 1024 * 1024,
} satisfies Partial<StreamConfig>;

export const PROMPTS_QUEUE: DurableQueue = {
  stream: STREAMS.prompts.name,
  consumer: {
    durable_name: STREAMS.prompts.durableConsumer,
    ack_policy: AckPolicy.Explicit,
    ack_wait: nanos(PROMPT_ACK_WAIT_MS),
    // Gateways look at all that wait, to be fair between clients.
    max_ack_pending: PROMPTS_CONFIG.max_msgs,
  },
};

export const WORK_QUEUE: DurableQueue = {
  stream: STREAMS.work.name,
  consumer: {
    durable_name: STREAMS.work.durableConsumer,
    ack_policy: AckPolicy.Explicit,
    ack_wait: nanos(ACK_WAIT_MS),
    max_ack_pending: WORK_CONFIG.max_msgs,
  },
};

type BoundedStream = Partial<StreamConfig> & { readonly name: string } & typeof NO_REMOVAL;

/** @param subjectsFor What it is to listen to, given what it listens to. */
async function ensureStream(
  manager: JetStreamManager,
  config: BoundedStream,
  subjectsFor: (existing?: string[]) => string[],
): Promise<void> {
  const { name } = config;
  const adjust = async (): Promise<void> => {
    const { subjects } = (await manager.streams.info(name)).config;
    await manager.streams.update(name, { ...config, subjects: subjectsFor(subjects) });
  };
  try {
    await adjust();
  } catch (cause) {
    if (!isRefusedWith(cause, 'streamNotFound')) throw cause;
    try {
      await manager.streams.add({ ...config, subjects: subjectsFor() });
    } catch (refusal) {
      if (!isRefusedWith(refusal, 'streamNameInUse')) throw refusal;
      await adjust();
    }
  }
}

async function ensureConsumer(manager: JetStreamManager, { stream, consumer }: DurableQueue): Promise<void> {
  try {
    await manager.consumers.add(stream, consumer);
  } catch (cause) {
    // From nats-server 2.10 on, making one does not adjust it.
    if (!isRefusedWith(cause, 'consumerExists')) throw cause;
    await manager.consumers.update(stream, consumer.durable_name, consumer);
  }
}

/**
 * Creates or adjusts the streams and the consumers of gateways and executors.
 * @throws LaminaError `nats_unreachable` when the server has no JetStream or refuses.
 */
export async function ensureStreams(bus: Bus): Promise<void> {
  try {
    const manager = await streamManager(bus);
    await ensureStream(manager, PROMPTS_CONFIG, () => [...STREAMS.prompts.subjects]);
    await ensureStream(manager, WORK_CONFIG, workSubjects);
    await ensureStream(manager, TOKENS_CONFIG, () => [...STREAMS.tokens.subjects]);
    for (const queue of [PROMPTS_QUEUE, WORK_QUEUE]) await ensureConsumer(manager, queue);
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    const advice =
      reason.includes('503') || reason.includes('jetstream not enabled')
        ? 'it runs without JetStream; start it with -js'
        : reason;
    throw new LaminaError('nats_unreachable', `nats-server cannot keep the streams of Lamina: ${advice}`, { cause });
  }
}
