/**
 * Owns the work queue: gateways submit work items, executors lease them.
 *
 * Invariants
 * 1. An item stays in the stream until its lease is completed; a lease that is neither renewed nor completed is offered again.
 * 2. An id that is in the queue is not taken again, however long it has waited there.
 * 3. Nobody takes an item back: one whose request was ended while it waited is taken and completed by an executor.
 * 4. What was completed is removed, also where the server lost that when it was killed (acknowledgements.ts).
 * 5. An item that cannot be read is not offered to others, where it would fail as well: its answer is ended, then it is removed.
 */
import {
  packMessage,
  parseMessage,
  STREAMS,
  SUBJECTS,
  unpackMessage,
  type WorkItem,
  workItemSchema,
} from '@lamina/protocol';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { ErrorCode, type JetStreamClient, type JsMsg, NatsError, type PubAck } from 'nats';
import { Acknowledgements, deliveredOf } from './acknowledgements.ts';
import { type Bus, tooLarge } from './bus.ts';
import { DurablePull } from './durable-pull.ts';
import { isRefusedWith } from './jetstream-codes.ts';
import { lastMessage } from './stored-message.ts';
import { streamManager } from './stream-manager.ts';
import { WORK_QUEUE } from './streams.ts';
import { readWorkKey, requestIdOfWork } from './work-key.ts';

/** One work item that this process has taken on. */
export interface WorkLease {
  readonly item: WorkItem;
  /** 1 on the first delivery. */
  readonly deliveryCount: number;
  /** Tells the queue that the item is still worked on; call at least every ACK_WAIT_MS / 2. */
  renew(): void;
  /** The answer is complete: removes the item. */
  complete(): void;
  /** Hands the item back, at once or after a while, for another executor. */
  release(delayMs?: number): void;
}

const SUBMIT_TIMEOUT_MS = 5_000;
const FULL_RETRY_MS = 1_000;
/** Before an unreadable item is offered again whose answer could not be ended. */
const UNREADABLE_RETRY_MS = 1_000;

function duplicateId(id: string, state: string, cause?: unknown): LaminaError {
  return new LaminaError('duplicate_id', `a request with the id "${id}" ${state}; choose another`, { cause });
}

export class WorkQueue {
  readonly #bus: Bus;
  readonly #jetstream: JetStreamClient;
  #leasing: { readonly pull: DurablePull; readonly acknowledgements: Acknowledgements } | undefined;
  /** In the subjects of the stream (work-key.ts), as read last. */
  #key: string | undefined;

  /** Call `ensureStreams` first. */
  constructor(bus: Bus) {
    this.#bus = bus;
    this.#jetstream = bus.connection.jetstream();
  }

  /**
   * Puts an item into the queue. Returns its stream sequence.
   * @throws LaminaError `overloaded` when the queue is full, `duplicate_id` when the id was submitted before,
   * `invalid_request` when it is larger than a message, `unavailable`.
   */
  async submit(item: WorkItem): Promise<number> {
    try {
      const ack = await this.#publish(item);
      if (ack.duplicate) throw duplicateId(item.id, 'was submitted a short time ago');
      return ack.seq;
    } catch (cause) {
      if (cause instanceof LaminaError) throw cause;
      if (isRefusedWith(cause, 'wrongLastSequence')) throw duplicateId(item.id, 'is already running', cause);
      if (isRefusedWith(cause, 'streamFull')) {
        throw new LaminaError('overloaded', 'the work queue is full; retry later', {
          cause,
          retryAfterMs: FULL_RETRY_MS,
        });
      }
      if (cause instanceof NatsError && cause.code === ErrorCode.MaxPayloadExceeded)
        throw tooLarge('the tokenized prompt', this.#bus, cause);
      throw new LaminaError('unavailable', 'the work queue does not take the prompt; is JetStream up?', { cause });
    }
  }

  async #publish(item: WorkItem): Promise<PubAck> {
    if (this.#key !== undefined) {
      try {
        return await this.#publishTo(this.#key, item);
      } catch (cause) {
        // Where nobody listens, the stream may have been made anew, with another key.
        if (!(cause instanceof NatsError) || cause.code !== ErrorCode.NoResponders) throw cause;
      }
    }
    this.#key = await readWorkKey(this.#bus);
    return this.#publishTo(this.#key, item);
  }

  #publishTo(key: string, item: WorkItem): Promise<PubAck> {
    return this.#jetstream.publish(SUBJECTS.work(key, item.id), packMessage(item), {
      // The rest of an answer that was cut off is submitted under an id that the server has seen.
      ...(item.isContinued !== true && { msgID: item.id }),
      timeout: SUBMIT_TIMEOUT_MS,
      expect: { lastSubjectSequence: 0 },
    });
  }

  /**
   * True while an item with this id waits or is leased.
   * @throws LaminaError `unavailable`
   */
  async has(requestId: string): Promise<boolean> {
    return (await lastMessage(this.#bus, STREAMS.work.name, SUBJECTS.work('*', requestId))) !== undefined;
  }

  /**
   * When the request of the item with this id was submitted, Unix time in ms: what its gateway says, or nats-server, whichever is
   * earlier. Undefined when there is none, or none that can be read.
   * @throws LaminaError `unavailable`
   */
  async submittedAtMs(requestId: string): Promise<number | undefined> {
    const stored = await lastMessage(this.#bus, STREAMS.work.name, SUBJECTS.work('*', requestId));
    if (stored === undefined) return undefined;
    try {
      return Math.min(itemOf(stored.data).submittedAtMs, stored.time.getTime());
    } catch {
      return undefined;
    }
  }

  /**
   * How many items wait for an executor.
   * @throws LaminaError `unavailable`
   */
  async waiting(): Promise<number> {
    try {
      const manager = await streamManager(this.#bus);
      const { num_pending } = await manager.consumers.info(STREAMS.work.name, STREAMS.work.durableConsumer);
      if (num_pending === 0) return 0;
      // Old servers were seen to count consumers' pending messages wrongly after deletions; the stream's count is exact.
      return Math.min(num_pending, (await manager.streams.info(STREAMS.work.name)).state.messages);
    } catch (cause) {
      throw new LaminaError('unavailable', 'the work queue cannot be read; is JetStream up?', { cause });
    }
  }

  /**
   * Waits up to `waitMs` for the next item. Returns undefined when there is none (or it was unreadable and removed).
   * @param onError Told of an unreadable item, and why the queue's consumer was made anew.
   * @param endAnswer Stores `error` as the end of the answer to an unreadable item; where it rejects, the item is kept.
   */
  async lease(
    waitMs: number,
    onError: (error: LaminaError) => void,
    endAnswer: (requestId: string, error: LaminaError) => Promise<void> = async () => undefined,
  ): Promise<WorkLease | undefined> {
    this.#leasing ??= {
      pull: new DurablePull(this.#bus, WORK_QUEUE, onError),
      acknowledgements: new Acknowledgements(this.#bus, WORK_QUEUE.stream),
    };
    const { pull, acknowledgements } = this.#leasing;
    const message = await pull.next(waitMs);
    if (message === undefined) return undefined;
    try {
      return leaseOf(message, itemOf(message.data), acknowledgements);
    } catch (cause) {
      const error = asLaminaError(cause);
      onError(error);
      try {
        const requestId = requestIdOfWork(message.subject);
        if (requestId !== undefined) await endAnswer(requestId, error);
        message.term();
        acknowledgements.remember(deliveredOf(message));
      } catch (failure) {
        onError(asLaminaError(failure));
        message.nak(UNREADABLE_RETRY_MS);
      }
      return undefined;
    }
  }
}

/** @throws LaminaError `protocol_violation` */
function itemOf(data: Uint8Array): WorkItem {
  return parseMessage('work item', workItemSchema, unpackMessage(data));
}

function leaseOf(message: JsMsg, item: WorkItem, acknowledgements: Acknowledgements): WorkLease {
  return {
    item,
    deliveryCount: message.info.redeliveryCount,
    renew: () => message.working(),
    complete: () => {
      message.ack();
      acknowledgements.remember(deliveredOf(message));
    },
    release: (delayMs) => message.nak(delayMs),
  };
}
