/**
 * Owns who may call /v1, how often, and whose requests it sees: API keys, client ids, the rate of requests, names of requests.
 *
 * Invariants
 * 1. With API keys, the key alone says which client it is; without, the header Lamina-Client does, and nobody checks it.
 * 2. With API keys, a request's id is the client's own name for it: two clients that choose the same have two requests, and
 *    neither can name, read or cancel the other's. Without keys an id means the same to everybody.
 * 3. What is not let in is answered when its headers are there: no body is received or parsed for it.
 * 4. What asks about a request is counted apart from what asks for an answer: who may send no more may still read and cancel.
 */
import { createHash } from 'node:crypto';
import type { IncomingHttpHeaders } from 'node:http';
import { LaminaError } from '@lamina/tensor';
import type { FastifyRequest } from 'fastify';
import { clientIdOf } from '../client-id.ts';
import type { ApiKeys } from './api-keys.ts';
import type { RateLimit } from './rate-limit.ts';

export interface Rates {
  /** Of requests for an answer. */
  readonly requests: RateLimit;
  /** Of requests about those: their state, their tokens, their cancellation. */
  readonly followUps: RateLimit;
}

export interface RouteHooks {
  readonly onRequest: (request: FastifyRequest) => Promise<void>;
}

export class Access {
  readonly #keys: ApiKeys | undefined;
  readonly #rates: Rates;
  readonly #clients = new WeakMap<FastifyRequest, string>();

  constructor(keys: ApiKeys | undefined, rates: Rates) {
    this.#keys = keys;
    this.#rates = rates;
  }

  /** Options of a route: each of its requests is let in, and counted, or answered `unauthorized`, `overloaded`, `invalid_request`. */
  admitting(kind: keyof Rates): RouteHooks {
    return this.#before((client) => this.#rates[kind].take(client));
  }

  /** The same for a route whose requests are not counted. */
  get identifying(): RouteHooks {
    return this.#before(() => undefined);
  }

  #before(take: (client: string) => void): RouteHooks {
    return {
      onRequest: async (request) => {
        const client = this.#identify(request.headers);
        take(client);
        this.#clients.set(request, client);
      },
    };
  }

  /** The client of a request that was let in. */
  clientOf(request: FastifyRequest): string {
    const client = this.#clients.get(request);
    if (client !== undefined) return client;
    throw new LaminaError('internal', `the route of ${request.method} ${request.url} lets in whoever asks`);
  }

  /** The id under which the cluster knows what a client calls `name`. */
  requestIdOf(client: string, name: string): string {
    if (this.#keys === undefined) return name;
    // Neither an id has a dot: no two pairs are the same text.
    return `k-${createHash('sha256').update(`${client}.${name}`).digest('base64url')}`;
  }

  /** @throws LaminaError `unauthorized`, `invalid_request` */
  #identify(headers: IncomingHttpHeaders): string {
    if (this.#keys === undefined) return clientIdOf(headers['lamina-client']?.toString());
    const key = /^Bearer +(\S+)$/i.exec(headers.authorization ?? '')?.[1];
    const client = key === undefined ? undefined : this.#keys.clientOf(key);
    if (client !== undefined) return client;
    const problem = key === undefined ? 'there is no API key' : 'the API key is not known';
    throw new LaminaError('unauthorized', `${problem}; send the header "Authorization: Bearer <key>"`);
  }
}
