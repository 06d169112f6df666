/**
 * Owns taking messages from the durable consumer of a work queue, and noticing that it does not offer what the queue has.
 *
 * Why so. A nats-server that was killed can come back with a consumer that counts messages as done which the stream still
 * has, and consumers that stopped offering messages were reported of most of its versions. Such a message waits for ever,
 * while everything looks idle.
 *
 * Invariants
 * 1. A consumer is made anew only when two looks agree: that the stream has a message from before everything that is not
 *    done; or that it has messages that nobody holds, and that a pull between the looks was given none. Looks at what another
 *    puller has made anew between them do not agree.
 * 2. A new consumer offers everything that the stream has, also what others hold, and counts deliveries anew: whoever takes a
 *    message finds out by its request's id what was reached, as long as the answer is stored. So two pullers that make a
 *    consumer anew in the same moment lose nothing: what one of them has taken by then is offered once more.
 * 3. The server is asked at most once in LOOK_INTERVAL_MS while messages come, and after each pull that waited in vain. That
 *    it does not answer keeps nobody from pulling.
 * 4. A consumer whose pullers hold as many messages as they may is in order.
 */
import { LaminaError } from '@lamina/tensor';
import type { Consumer, ConsumerConfig, JsMsg } from 'nats';
import type { Bus } from './bus.ts';
import { isRefusedWith } from './jetstream-codes.ts';
import { streamManager } from './stream-manager.ts';

export interface DurableQueue {
  readonly stream: string;
  readonly consumer: Partial<ConsumerConfig> & { readonly durable_name: string };
}

const LOOK_INTERVAL_MS = 30_000;
/** How long a pull waits between two looks. */
const DOUBT_WAIT_MS = 2_000;

/** What there would be to repair, if it stays so. */
interface Doubt {
  /** When the consumer was made, by the server: another time is another consumer of the same name. */
  readonly created: string;
  /** Sequence of the first message of the stream, where the consumer counts it as done. */
  readonly passedOver: number | undefined;
  /** Deliveries so far, where messages are held by nobody. */
  readonly numDelivered: number | undefined;
}

export class DurablePull {
  readonly #bus: Bus;
  readonly #queue: DurableQueue;
  readonly #onRepair: (error: LaminaError) => void;
  #consumer: Consumer | undefined;
  #doubt: Doubt | undefined;
  #lookedAtMs = performance.now();

  /** @param onRepair Told why a consumer was made anew. */
  constructor(bus: Bus, queue: DurableQueue, onRepair: (error: LaminaError) => void) {
    this.#bus = bus;
    this.#queue = queue;
    this.#onRepair = onRepair;
  }

  /** Waits up to `waitMs` for the next message. Rejects when JetStream is away. */
  async next(waitMs: number): Promise<JsMsg | undefined> {
    if (performance.now() - this.#lookedAtMs > LOOK_INTERVAL_MS) await this.#tryToLook(false);
    try {
      this.#consumer ??= await this.#find();
      const expires = this.#doubt === undefined ? waitMs : Math.min(waitMs, DOUBT_WAIT_MS);
      const message = await this.#consumer.next({ expires });
      if (message !== null) return message;
      await this.#tryToLook(true);
      return undefined;
    } catch (cause) {
      this.#consumer = undefined;
      throw cause;
    }
  }

  async #find(): Promise<Consumer> {
    const { stream, consumer } = this.#queue;
    const { consumers } = this.#bus.connection.jetstream();
    try {
      return await consumers.get(stream, consumer.durable_name);
    } catch (cause) {
      if (!isRefusedWith(cause, 'consumerNotFound')) throw cause;
      await (await streamManager(this.#bus)).consumers.add(stream, consumer);
      return consumers.get(stream, consumer.durable_name);
    }
  }

  async #tryToLook(wasInVain: boolean): Promise<void> {
    this.#lookedAtMs = performance.now();
    try {
      await this.#look(wasInVain);
    } catch (cause) {
      this.#doubt = undefined;
      // The next pull makes it.
      if (isRefusedWith(cause, 'consumerNotFound')) this.#consumer = undefined;
    }
  }

  /** @param wasInVain A pull has just waited and was given nothing. */
  async #look(wasInVain: boolean): Promise<void> {
    const { stream, consumer } = this.#queue;
    const manager = await streamManager(this.#bus);
    // In this order: what is done by the first answer has, on a single server, left the stream by the second.
    const info = await manager.consumers.info(stream, consumer.durable_name);
    const { ack_floor, delivered, num_ack_pending, config, created } = info;
    const { messages, first_seq } = (await manager.streams.info(stream)).state;
    const former = this.#doubt?.created === created ? this.#doubt : undefined;
    const passedOver = messages > 0 && first_seq <= ack_floor.stream_seq ? first_seq : undefined;
    const mayDeliver = num_ack_pending < (config.max_ack_pending ?? Number.POSITIVE_INFINITY);
    const isUnheld = wasInVain && mayDeliver && messages > num_ack_pending;
    const numDelivered = isUnheld ? delivered.consumer_seq : undefined;
    const isPassedOver = passedOver !== undefined && passedOver === former?.passedOver;
    const isStuck = numDelivered !== undefined && numDelivered === former?.numDelivered;
    const isInDoubt = passedOver !== undefined || numDelivered !== undefined;
    this.#doubt = isInDoubt ? { created, passedOver, numDelivered } : undefined;
    if (!isPassedOver && !isStuck) return;
    this.#doubt = undefined;
    this.#consumer = undefined;
    await manager.consumers.delete(stream, consumer.durable_name);
    await manager.consumers.add(stream, consumer);
    const what = isPassedOver
      ? `message ${first_seq}, which it counts as done`
      : `${messages - num_ack_pending} messages`;
    this.#onRepair(new LaminaError('unavailable', `the consumer of ${stream} did not offer ${what}; it was made anew`));
  }
}
