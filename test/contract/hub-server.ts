/**
 * Owns a hub on loopback for tests: the HTTP API of Hugging Face's, as far as a download uses it. Model information, a
 * listing in pages, files, large files by a redirect to another origin, byte ranges, ETags, its error codes.
 *
 * Invariants
 * 1. Nothing here knows of the client: what it says is what the hub was seen to say.
 */
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';

export interface HubRepo {
  /** Path -> contents. */
  readonly files: Readonly<Record<string, Uint8Array | string>>;
  /** Read with this token only. */
  readonly token?: string;
  readonly isGated?: boolean;
}

export interface SeenRequest {
  readonly path: string;
  readonly origin: 'hub' | 'cdn';
  readonly range: string | undefined;
  readonly authorization: string | undefined;
}

export interface HubFaults {
  /** Answers of files that are cut off after so many bytes, one entry each, in order. */
  cuts: number[];
  /** Contents that a large file is answered with instead of its own, once. */
  damaged: Uint8Array | undefined;
  /** Answers of files that are 503, that many. */
  busy: number;
  /** Ranges are ignored: the whole file comes with 200. */
  ignoresRanges: boolean;
}

const LARGE_BYTES = 65_536;
const PAGE_ENTRIES = 4;

export class HubServer {
  readonly seen: SeenRequest[] = [];
  readonly faults: HubFaults = { cuts: [], damaged: undefined, busy: 0, ignoresRanges: false };
  readonly repos = new Map<string, HubRepo>();
  readonly #hub: Server;
  readonly #cdn: Server;

  private constructor() {
    this.#hub = createServer((request, response) => this.#onHub(request, response));
    this.#cdn = createServer((request, response) => this.#onCdn(request, response));
  }

  static async start(): Promise<HubServer> {
    const server = new HubServer();
    for (const each of [server.#hub, server.#cdn]) await once(each.listen(0, '127.0.0.1'), 'listening');
    return server;
  }

  get endpoint(): string {
    return originOf(this.#hub);
  }

  /** The commit of the repository: another one when its contents change. */
  commitOf(repo: string): string {
    return sha(
      'sha1',
      JSON.stringify(Object.entries(this.repos.get(repo)?.files ?? {}).map(([k, v]) => [k, sha('sha256', v)])),
    );
  }

  /** File requests since the last call. */
  takeSeen(): SeenRequest[] {
    return this.seen.splice(0);
  }

  async stop(): Promise<void> {
    for (const each of [this.#hub, this.#cdn]) {
      each.closeAllConnections();
      await new Promise((resolve) => each.close(resolve));
    }
  }

  #onHub(request: IncomingMessage, response: ServerResponse): void {
    const url = new URL(request.url ?? '/', this.endpoint);
    const api = /^\/api\/models\/([^/]+\/[^/]+)\/(revision|tree)\/([^/]+)$/.exec(url.pathname);
    const file = /^\/([^/]+\/[^/]+)\/resolve\/([^/]+)\/(.+)$/.exec(url.pathname);
    const repo = api?.[1] ?? file?.[1] ?? '';
    const revision = decodeURIComponent(api?.[3] ?? file?.[2] ?? '');
    const held = this.repos.get(repo);
    // Without a token the hub does not say whether a private repository exists.
    if (held === undefined || (held.token !== undefined && request.headers.authorization !== `Bearer ${held.token}`)) {
      const isKnown = request.headers.authorization !== undefined;
      refuse(response, isKnown && held === undefined ? 404 : 401, 'RepoNotFound');
    } else if (held.isGated === true && file !== null) refuse(response, 403, 'GatedRepo');
    else if (revision !== 'main' && revision !== this.commitOf(repo)) refuse(response, 404, 'RevisionNotFound');
    else if (api?.[2] === 'revision') {
      json(response, {
        _id: '1',
        id: repo,
        sha: this.commitOf(repo),
        private: false,
        downloads: 0,
        likes: 0,
        gated: false,
      });
    } else if (api?.[2] === 'tree') this.#tree(url, held, response);
    else if (file !== null) this.#file(request, response, held, decodeURIComponent(file[3]!));
    else refuse(response, 404, 'EntryNotFound');
  }

  #tree(url: URL, { files }: HubRepo, response: ServerResponse): void {
    const entries = Object.entries(files).map(([path, contents]) => {
      const bytes = Buffer.from(contents);
      const lfs = { oid: sha('sha256', bytes), size: bytes.length, pointerSize: 130 };
      const oid = sha('sha1', Buffer.concat([Buffer.from(`blob ${bytes.length}\0`), bytes]));
      return { type: 'file', path, size: bytes.length, oid, ...(isLarge(bytes) ? { lfs } : {}) };
    });
    const from = Number(url.searchParams.get('cursor') ?? 0);
    const to = from + PAGE_ENTRIES;
    if (to < entries.length) {
      url.searchParams.set('cursor', String(to));
      response.setHeader('link', `<${url.href}>; rel="next"`);
    }
    const directories = from === 0 ? [{ type: 'directory', path: 'onnx', size: 0, oid: '0' }] : [];
    json(response, [...directories, ...entries.slice(from, to)]);
  }

  #file(request: IncomingMessage, response: ServerResponse, { files }: HubRepo, path: string): void {
    const contents = files[path];
    if (contents === undefined) {
      refuse(response, 404, 'EntryNotFound');
      return;
    }
    const bytes = Buffer.from(contents);
    if (!isLarge(bytes)) {
      this.#note(request, 'hub');
      send(request, response, bytes, `"${sha('sha1', bytes)}"`);
      return;
    }
    response.writeHead(302, {
      location: `${originOf(this.#cdn)}/${sha('sha256', bytes)}`,
      'x-linked-size': String(bytes.length),
      'x-linked-etag': `"${sha('sha256', bytes)}"`,
    });
    response.end();
  }

  #onCdn(request: IncomingMessage, response: ServerResponse): void {
    this.#note(request, 'cdn');
    const held = [...this.repos.values()].flatMap(({ files }) => Object.values(files)).map((each) => Buffer.from(each));
    const bytes = held.find((each) => `/${sha('sha256', each)}` === request.url);
    const { faults } = this;
    if (bytes === undefined) refuse(response, 404, 'EntryNotFound');
    else if (faults.busy > 0) {
      faults.busy--;
      refuse(response, 503, '');
    } else {
      const sent = faults.damaged ?? bytes;
      faults.damaged = undefined;
      send(request, response, sent, `"${sha('sha256', bytes)}"`, faults.cuts.shift(), faults.ignoresRanges);
    }
  }

  #note(request: IncomingMessage, origin: SeenRequest['origin']): void {
    const { range, authorization } = request.headers;
    this.seen.push({ path: request.url ?? '', origin, range, authorization });
  }
}

function originOf(server: Server): string {
  const address = server.address();
  return typeof address === 'object' && address !== null ? `http://127.0.0.1:${address.port}` : '';
}

export function sha(kind: 'sha1' | 'sha256', contents: Uint8Array | string): string {
  return createHash(kind).update(contents).digest('hex');
}

function isLarge(bytes: Uint8Array): boolean {
  return bytes.length >= LARGE_BYTES;
}

function json(response: ServerResponse, value: unknown): void {
  response.writeHead(200, { 'content-type': 'application/json; charset=utf-8' });
  response.end(JSON.stringify(value));
}

function refuse(response: ServerResponse, status: number, code: string): void {
  response.writeHead(status, { 'content-type': 'application/json', ...(code === '' ? {} : { 'x-error-code': code }) });
  response.end(JSON.stringify({ error: code }));
}

function send(
  request: IncomingMessage,
  response: ServerResponse,
  bytes: Uint8Array,
  etag: string,
  cutAfterBytes?: number,
  ignoresRanges = false,
): void {
  const start = ignoresRanges ? undefined : /^bytes=(\d+)-/.exec(request.headers.range ?? '')?.[1];
  const from = Number(start ?? 0);
  if (from >= bytes.length && bytes.length > 0) {
    response.writeHead(416, { 'content-range': `bytes */${bytes.length}` });
    response.end();
    return;
  }
  const range = { 'content-range': `bytes ${from}-${bytes.length - 1}/${bytes.length}` };
  response.writeHead(start === undefined ? 200 : 206, {
    etag,
    'accept-ranges': 'bytes',
    'content-length': bytes.length - from,
    ...(start === undefined ? {} : range),
  });
  if (cutAfterBytes === undefined) response.end(bytes.subarray(from));
  else response.write(bytes.subarray(from, from + cutAfterBytes), () => setTimeout(() => request.socket.destroy(), 20));
}
