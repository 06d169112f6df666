/**
 * Owns who may call /v1, how often, and whose requests it sees: API keys, client ids, the rate of requests, names of requests.
 *
 * Invariants
 * 1. With API keys, the key alone says which client it is; without, the header Lamina-Client does, and nobody checks it.
 * 2. With API keys, a request's id is the client's own name for it: two clients that choose the same have two requests, and
 *    neither can name, read or cancel the other's. Without keys an id means the same to everybody.
 * 3. What asks about a request is counted apart from what asks for an answer: who may send no more may still read and cancel.
 */
import { createHash } from 'node:crypto';
import type { IncomingHttpHeaders } from 'node:http';
import { LaminaError } from '@lamina/tensor';
import { clientIdOf } from '../client-id.ts';
import type { ApiKeys } from './api-keys.ts';
import type { RateLimit } from './rate-limit.ts';

export interface Rates {
  /** Of requests for an answer. */
  readonly requests: RateLimit;
  /** Of requests about those: their state, their tokens, their cancellation. */
  readonly followUps: RateLimit;
}

export class Access {
  readonly #keys: ApiKeys | undefined;
  readonly #rates: Rates;

  constructor(keys: ApiKeys | undefined, rates: Rates) {
    this.#keys = keys;
    this.#rates = rates;
  }

  /**
   * The client of a request; counts it.
   * @throws LaminaError `unauthorized`, `overloaded`, `invalid_request`
   */
  admit(headers: IncomingHttpHeaders, kind: keyof Rates): string {
    const client = this.identify(headers);
    this.#rates[kind].take(client);
    return client;
  }

  /** The id under which the cluster knows what a client calls `name`. */
  requestIdOf(client: string, name: string): string {
    if (this.#keys === undefined) return name;
    // Neither an id has a dot: no two pairs are the same text.
    return `k-${createHash('sha256').update(`${client}.${name}`).digest('base64url')}`;
  }

  /** @throws LaminaError `unauthorized`, `invalid_request` */
  identify(headers: IncomingHttpHeaders): string {
    if (this.#keys === undefined) return clientIdOf(headers['lamina-client']?.toString());
    const key = /^Bearer +(\S+)$/i.exec(headers.authorization ?? '')?.[1];
    const client = key === undefined ? undefined : this.#keys.clientOf(key);
    if (client !== undefined) return client;
    const problem = key === undefined ? 'there is no API key' : 'the API key is not known';
    throw new LaminaError('unauthorized', `${problem}; send the header "Authorization: Bearer <key>"`);
  }
}
