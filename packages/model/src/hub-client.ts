/**
 * Owns talking to a hub: the listing of a repository and the bytes of its files, and what its refusals mean.
 *
 * Invariants
 * 1. The token is sent to the hub's own origin only, never to where a download is redirected.
 * 2. A refusal is a LaminaError that says what to do; what may pass by itself (429, 5xx, no connection) is `unavailable`.
 * 3. The library lists; files are fetched here, because it can neither continue a download nor check one.
 */
import { LaminaError } from '@lamina/tensor';
import type { RepoFile } from './hub-files.ts';
import type { RepoName } from './hub-name.ts';
import { reasonOf } from './model-error.ts';

export interface HubAccess {
  /** `https://huggingface.co`, or a mirror. */
  readonly endpoint: string;
  /** For private and gated repositories. */
  readonly token?: string | undefined;
}

/** A download or an answer that brings nothing for so long is given up, in milliseconds. */
export const HUB_SILENCE_MS = 30_000;

export interface RepoListing {
  readonly commit: string;
  readonly files: readonly RepoFile[];
}

export class HubClient {
  readonly #endpoint: string;
  readonly #token: string | undefined;

  /** @throws LaminaError `config_invalid` */
  constructor({ endpoint, token }: HubAccess) {
    if (!URL.canParse(endpoint) || !/^https?:$/.test(new URL(endpoint).protocol)) {
      throw new LaminaError('config_invalid', `HF_ENDPOINT "${endpoint}" is no http(s) URL`);
    }
    this.#endpoint = endpoint.replace(/\/+$/, '');
    this.#token = token;
  }

  /** The commit that the revision is, and all of its files. */
  async list(name: RepoName): Promise<RepoListing> {
    try {
      return await this.#list(name);
    } catch (cause) {
      if (cause instanceof LaminaError) throw cause;
      const message = `${this.#endpoint} does not answer like a hub (${reasonOf(cause)}); check HF_ENDPOINT`;
      throw new LaminaError('unavailable', message, { cause });
    }
  }

  async #list(name: RepoName): Promise<RepoListing> {
    const { listFiles, modelInfo } = await import('@huggingface/hub');
    const common = { hubUrl: this.#endpoint, fetch: this.#fetchFor(name) };
    const { revision, repo } = name;
    const { sha } = await modelInfo({ ...common, name: repo, revision, additionalFields: ['sha'] });
    if (!/^[0-9a-f]{40}$/.test(sha)) throw new TypeError(`no commit for ${repo}`);
    const files: RepoFile[] = [];
    for await (const entry of listFiles({ ...common, repo, revision: sha, recursive: true })) {
      if (entry.type !== 'file') continue;
      const { path, size, oid, lfs } = entry;
      if (lfs === undefined && oid === undefined) continue;
      const checksum =
        lfs === undefined ? ({ kind: 'git', hex: oid ?? '' } as const) : ({ kind: 'sha256', hex: lfs.oid } as const);
      files.push({ path, bytes: size, checksum });
    }
    return { commit: sha, files };
  }

  /** The file from `fromByte` on. Its status is 206, or 200 where the server gives the whole. */
  fetchFile(name: RepoName, commit: string, path: string, fromByte: number, signal: AbortSignal): Promise<Response> {
    const encoded = path.split('/').map(encodeURIComponent).join('/');
    const url = `${this.#endpoint}/${name.repo}/resolve/${commit}/${encoded}`;
    // Compressed, a byte range would be one of the compressed bytes.
    const headers = { 'accept-encoding': 'identity', ...(fromByte > 0 ? { range: `bytes=${fromByte}-` } : {}) };
    return this.#fetchFor(name)(url, { headers, signal });
  }

  #fetchFor(name: RepoName): typeof fetch {
    return async (input, init = {}) => {
      const url = new URL(input instanceof Request ? input.url : input);
      const headers = new Headers(init.headers);
      // fetch drops the header by itself when a redirect leads to another origin.
      if (this.#token !== undefined && url.origin === new URL(this.#endpoint).origin) {
        headers.set('authorization', `Bearer ${this.#token}`);
      }
      let response: Response;
      try {
        response = await fetch(url, { signal: AbortSignal.timeout(HUB_SILENCE_MS), ...init, headers });
      } catch (cause) {
        throw unreachable(this.#endpoint, cause);
      }
      if (!response.ok) {
        const error = refusal(response, name, this.#endpoint, this.#token !== undefined);
        await response.body?.cancel().catch(() => undefined);
        throw error;
      }
      return response;
    };
  }
}

function unreachable(endpoint: string, cause: unknown): LaminaError {
  const inner = cause instanceof Error && cause.cause instanceof Error ? cause.cause : cause;
  const message = `no connection to ${endpoint} (${reasonOf(inner)}); check the network, or name a mirror in HF_ENDPOINT`;
  return new LaminaError('unavailable', message, { cause });
}

function refusal(response: Response, { repo, revision }: RepoName, endpoint: string, hasToken: boolean): LaminaError {
  const { status } = response;
  const code = response.headers.get('x-error-code') ?? '';
  const token = hasToken ? 'the token in HF_TOKEN does not open it' : 'set HF_TOKEN to a token that may read it';
  if (code === 'GatedRepo' || status === 403) {
    return new LaminaError(
      'model_invalid',
      `${repo} is gated (${status}): accept its terms at ${endpoint}/${repo}, and ${token}`,
    );
  }
  if (status === 401) {
    return new LaminaError(
      'model_invalid',
      `${repo} is private, or does not exist (401): check its name, and ${token}`,
    );
  }
  if (code === 'RevisionNotFound') {
    return new LaminaError('model_invalid', `${repo} has no revision "${revision}" at ${endpoint} (404)`);
  }
  if (status === 404) {
    const problem = `${endpoint} has no repository ${repo} with a revision "${revision}" (404)`;
    return new LaminaError('model_invalid', `${problem}; check the name`);
  }
  const answer = `${endpoint} answered ${status} for ${repo}`;
  if (status === 429 || status >= 500) return new LaminaError('unavailable', `${answer}; try again later`);
  return new LaminaError('model_invalid', `${answer}; check the name and HF_ENDPOINT`);
}
