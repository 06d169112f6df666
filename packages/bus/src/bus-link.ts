/** Owns the tensor link over nats.js: for where there is no native one. */
import { Bus, type BusEvents, type BusMessage, type Subscription } from './bus.ts';
import type { BusOptions } from './connection.ts';
import type { LinkMessage, LinkStatus, TensorLink } from './tensor-link.ts';

/** nats.js never writes to a received chunk again. */
class BusLinkMessage implements LinkMessage {
  readonly #message: BusMessage;

  constructor(message: BusMessage) {
    this.#message = message;
  }

  get subject(): string {
    return this.#message.subject;
  }

  get data(): Uint8Array {
    return this.#message.data;
  }

  get reply(): string | undefined {
    return this.#message.reply;
  }

  hold(): undefined {
    return undefined;
  }
}

export class BusLink implements TensorLink {
  readonly kind = 'nats';
  readonly #bus: Bus;

  private constructor(bus: Bus) {
    this.#bus = bus;
  }

  /** @throws LaminaError `nats_unreachable` */
  static async connect(options: BusOptions, events: BusEvents): Promise<BusLink> {
    return new BusLink(await Bus.connect(options, events));
  }

  get maxPayloadBytes(): number {
    return this.#bus.maxPayloadBytes;
  }

  get isClosed(): boolean {
    return this.#bus.isClosed;
  }

  publish(subject: string, data: Uint8Array, reply?: string): void {
    this.#bus.publish(subject, data, reply);
  }

  subscribe(subject: string, callback: (message: LinkMessage) => void): Subscription {
    return this.#bus.subscribe(subject, (message) => callback(new BusLinkMessage(message)));
  }

  receive(): boolean {
    return false;
  }

  onStatus(callback: (status: LinkStatus) => void): void {
    this.#bus.onStatus((type) => {
      if (type === 'disconnect' || type === 'reconnect') callback(type);
    });
  }

  flush(): Promise<void> {
    return this.#bus.flush();
  }

  close(): Promise<boolean> {
    return this.#bus.close();
  }
}
