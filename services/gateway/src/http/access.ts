/**
 * Owns who may call /v1 and how often: API keys, client ids, the rate of requests.
 *
 * Invariants
 * 1. With API keys, the key alone says which client it is; without, the header Lamina-Client does, and nobody checks it.
 */
import type { IncomingHttpHeaders } from 'node:http';
import { LaminaError } from '@lamina/tensor';
import { clientIdOf } from '../client-id.ts';
import type { ApiKeys } from './api-keys.ts';
import type { RateLimit } from './rate-limit.ts';

export class Access {
  readonly #keys: ApiKeys | undefined;
  readonly #rate: RateLimit;

  constructor(keys: ApiKeys | undefined, rate: RateLimit) {
    this.#keys = keys;
    this.#rate = rate;
  }

  /**
   * The client of a request; counts it.
   * @throws LaminaError `unauthorized`, `overloaded`, `invalid_request`
   */
  admit(headers: IncomingHttpHeaders): string {
    const client = this.identify(headers);
    this.#rate.take(client);
    return client;
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
