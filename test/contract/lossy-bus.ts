/**
 * Owns a bus between one executor and a kv-manager on which the test says when a call arrives, when its answer does, and
 * what is lost.
 */
import { LaminaError } from '@lamina/tensor';
import type { KvClientOptions } from '../../services/dense-executor/src/kv-client.ts';

type CallBus = KvClientOptions['bus'];

/** Carries calls in order. */
export class LossyBus implements CallBus {
  readonly #serve: (subject: string, body: unknown) => unknown;
  readonly #calls: (() => void)[] = [];
  readonly #replies: (() => void)[] = [];
  readonly #handlers = new Map<string, (body: unknown) => void>();
  readonly #events: (() => void)[] = [];

  constructor(serve: (subject: string, body: unknown) => unknown) {
    this.#serve = serve;
  }

  request: CallBus['request'] = (endpoint, body, { timeoutMs }) =>
    new Promise((resolve, reject) => {
      // A call that was given up is still on its way.
      setTimeout(() => reject(new LaminaError('unavailable', 'no answer in time')), timeoutMs);
      this.#calls.push(() => {
        try {
          const reply = endpoint.reply.parse(this.#serve(endpoint.subject, endpoint.request.parse(body)));
          this.#replies.push(() => resolve(reply));
        } catch (cause) {
          if (!(cause instanceof LaminaError)) throw cause;
          this.#replies.push(() => reject(cause));
        }
      });
    });

  onEvent: CallBus['onEvent'] = (subject, handler) => {
    this.#handlers.set(subject.subject, (body) => handler(subject.body.parse(body)));
    return { unsubscribe: () => undefined, drain: () => Promise.resolve() };
  };

  publish(subject: string, body: unknown): void {
    this.#events.push(() => this.#handlers.get(subject)?.(body));
  }

  deliver(count: number): void {
    for (const call of this.#calls.splice(0, count)) call();
  }

  reply(count: number): void {
    for (const deliver of [...this.#events.splice(0, count), ...this.#replies.splice(0, count)]) deliver();
  }

  lose(isReply: boolean): void {
    if (isReply) this.#replies.shift();
    else this.#calls.shift();
  }

  loseEvent(): void {
    this.#events.shift();
  }
}
