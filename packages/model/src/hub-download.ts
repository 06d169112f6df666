/**
 * Owns downloading one file of a repository: continued where it broke off, and checked before it counts.
 *
 * Invariants
 * 1. A file has its name only once all of its bytes are there and their checksum is right; until then it is `NAME.partial`.
 * 2. What is there of it is never downloaded again, in this run or the next, unless its checksum proves it wrong.
 * 3. Memory is one chunk. A server that goes silent, ends early or is overloaded is asked again, ever more slowly.
 */
import { createHash, type Hash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, open, rename, rm, stat } from 'node:fs/promises';
import { dirname } from 'node:path';
import { LaminaError } from '@lamina/tensor';
import { writeFully } from './file-io.ts';
import { HUB_SILENCE_MS, type HubClient } from './hub-client.ts';
import type { RepoFile } from './hub-files.ts';
import type { RepoName } from './hub-name.ts';
import { reasonOf, systemErrorCode } from './model-error.ts';

export interface DownloadSource {
  readonly client: HubClient;
  readonly name: RepoName;
  readonly commit: string;
}

/** Attempts in a row that bring not one byte before it is given up. */
const MAX_BARREN_ATTEMPTS = 5;
const FIRST_PAUSE_MS = 250;
const LONGEST_PAUSE_MS = 8_000;

/** Bytes of the file that are there already, whole or partial. */
export async function bytesAt(path: string, file: RepoFile): Promise<number> {
  const size = async (of: string): Promise<number> => (await stat(of).catch(() => undefined))?.size ?? 0;
  const whole = await size(path);
  return whole === file.bytes ? whole : Math.min(await size(`${path}.partial`), file.bytes);
}

/** Downloads `file` to `path`. `onBytes` is told of every change of what is there, which may be less than before. */
export async function downloadFile(
  source: DownloadSource,
  file: RepoFile,
  path: string,
  onBytes: (bytes: number) => void,
): Promise<void> {
  if ((await stat(path).catch(() => undefined))?.size === file.bytes) return;
  const partial = `${path}.partial`;
  await mkdir(dirname(path), { recursive: true });
  for (let isRepeated = false; ; isRepeated = true) {
    const startedWith = await bytesAt(path, file);
    await fetchRest(source, file, partial, onBytes);
    const checksum = await checksumOf(partial, file);
    if (checksum === file.checksum.hex) break;
    await rm(partial, { force: true });
    onBytes(0);
    // Bytes of an earlier run may have been wrong; these were all fetched now.
    if (isRepeated || startedWith === 0) {
      const { kind, hex } = file.checksum;
      const problem = `its ${kind === 'git' ? 'git id' : kind} is ${checksum}, the repository says ${hex}`;
      throw new LaminaError(
        'model_invalid',
        `${source.name.repo}: ${file.path} arrived damaged: ${problem}; try again`,
      );
    }
  }
  await rename(partial, path);
}

async function fetchRest(
  source: DownloadSource,
  file: RepoFile,
  partial: string,
  onBytes: (bytes: number) => void,
): Promise<void> {
  let barren = 0;
  for (;;) {
    const before = (await stat(partial).catch(() => undefined))?.size ?? 0;
    if (before === file.bytes && file.bytes > 0) return;
    try {
      await fetchOnce(source, file, partial, before <= file.bytes ? before : 0, onBytes);
      return;
    } catch (cause) {
      const isPassing = !(cause instanceof LaminaError) || cause.code === 'unavailable';
      const after = (await stat(partial).catch(() => undefined))?.size ?? 0;
      barren = after > before ? 0 : barren + 1;
      if (!isPassing || systemErrorCode(cause) === 'ENOSPC') throw cause;
      if (barren >= MAX_BARREN_ATTEMPTS) {
        const message = `${source.name.repo}: ${file.path} stopped at ${after} of ${file.bytes} bytes (${reasonOf(cause)})`;
        throw new LaminaError('unavailable', `${message}; the same command continues it`, { cause });
      }
      await new Promise((resolve) => setTimeout(resolve, Math.min(FIRST_PAUSE_MS * 2 ** barren, LONGEST_PAUSE_MS)));
    }
  }
}

/** One request. Resolves when the file has all of its bytes, rejects when the connection ended before. */
async function fetchOnce(
  { client, name, commit }: DownloadSource,
  file: RepoFile,
  partial: string,
  fromByte: number,
  onBytes: (bytes: number) => void,
): Promise<void> {
  const silence = new AbortController();
  const giveUp = (): void => silence.abort(new Error(`nothing came for ${HUB_SILENCE_MS} ms`));
  let timer = setTimeout(giveUp, HUB_SILENCE_MS);
  const output = await open(partial, fromByte === 0 ? 'w' : 'r+');
  try {
    const response = await client.fetchFile(name, commit, file.path, fromByte, silence.signal);
    let position = startOf(response, fromByte);
    if (position !== fromByte) await output.truncate(position);
    if (response.body !== null) {
      for await (const chunk of response.body) {
        clearTimeout(timer);
        timer = setTimeout(giveUp, HUB_SILENCE_MS);
        if (position + chunk.byteLength > file.bytes) {
          await output.truncate(0);
          throw new LaminaError('model_invalid', `${name.repo}: ${file.path} is longer than the repository says`);
        }
        position = await writeFully(output, chunk, position);
        onBytes(position);
      }
    }
    if (position < file.bytes) throw new Error('the connection ended early');
  } finally {
    clearTimeout(timer);
    await output.close();
  }
}

/** Where the answer's bytes belong: a server that knows no ranges begins anew. */
function startOf(response: Response, asked: number): number {
  if (response.status !== 206) return 0;
  const start = Number(/^bytes (\d+)-/.exec(response.headers.get('content-range') ?? '')?.[1] ?? asked);
  if (start !== asked) throw new Error(`asked for bytes from ${asked} on and got those from ${start} on`);
  return start;
}

async function checksumOf(path: string, file: RepoFile): Promise<string> {
  const isGit = file.checksum.kind === 'git';
  const hash: Hash = createHash(isGit ? 'sha1' : 'sha256');
  if (isGit) hash.update(`blob ${file.bytes}\0`);
  for await (const chunk of createReadStream(path, { highWaterMark: 1024 * 1024 })) hash.update(chunk);
  return hash.digest('hex');
}
