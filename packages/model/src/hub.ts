/**
 * Owns pulling models from a hub into the cache, and finding the model that a name means.
 *
 * Invariants
 * 1. A pulled model appears whole or not at all: it is downloaded into `NAME.partial`, which any later pull of the same
 *    commit continues, and renamed.
 * 2. What is cached is used without asking the hub; only a pull looks whether the revision has moved.
 * 3. No environment is read here: where the hub is, and its token, are given.
 */
import { mkdir, readFile, rename, stat, writeFile } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { LaminaError } from '@lamina/tensor';
import { z } from 'zod';
import { checkFreeSpace } from './disk-space.ts';
import { type HubAccess, HubClient } from './hub-client.ts';
import { bytesAt, downloadFile } from './hub-download.ts';
import { genaiVariant, SAFETENSORS_VARIANT, selectFiles, TEXT_VARIANT } from './hub-files.ts';
import { whileLocked } from './hub-lock.ts';
import { parseRepoName, type RepoName, type RepoPlaces, repoPlaces, requireRepoName, variantDir } from './hub-name.ts';
import { reasonOf, systemErrorCode } from './model-error.ts';

export interface PullProgress {
  readonly repo: string;
  /** The file that is being downloaded. */
  readonly file: string;
  /** Of all files, those of earlier runs included. */
  readonly doneBytes: number;
  readonly totalBytes: number;
  /** What of it was there before. */
  readonly resumedBytes: number;
}

export interface PullOptions extends HubAccess {
  readonly cacheDir: string;
  /** `safetensors`, or an ONNX variant such as `q4f16`; default: see selectFiles. */
  readonly weights?: string | undefined;
  /** Only what describes the model and its tokenizer, where weights are files of their own (safetensors). */
  readonly textOnly?: boolean;
  readonly onProgress?: (progress: PullProgress) => void;
  /** Another process is pulling the same. */
  readonly onWait?: () => void;
}

export interface PulledModel {
  readonly dir: string;
  readonly commit: string;
  readonly variant: string;
  readonly files: number;
  readonly totalBytes: number;
  readonly isCached: boolean;
}

const referenceSchema = z.object({ commit: z.string().regex(/^[0-9a-f]{40}$/), variant: z.string() });

/**
 * The directory of the model that `name` means: a directory, a cached repository, or one that is pulled now.
 * @throws LaminaError when it can be none of them, or cannot be pulled.
 */
export async function resolveModel(name: string, options: PullOptions): Promise<string> {
  const repo = await repoMeant(name);
  if (repo === undefined) return resolve(name);
  const cached = await findCached(repo, options);
  if (cached !== undefined) return cached;
  try {
    return (await pull(repo, options)).dir;
  } catch (cause) {
    if (!(cause instanceof LaminaError)) throw cause;
    throw new LaminaError(cause.code, `"${name}" is no directory here and not in the cache; ${cause.message}`, {
      cause,
    });
  }
}

/** The repository that `name` means, or undefined where it is a path. */
export async function repoMeant(name: string): Promise<RepoName | undefined> {
  const repo = parseRepoName(name);
  return repo === undefined || (await isDirectory(resolve(name))) ? undefined : repo;
}

/** Downloads what is missing of `owner/name[@revision][:folder]`, as the revision is now. */
export function pullModel(repoName: string, options: PullOptions): Promise<PulledModel> {
  return Promise.resolve().then(() => pull(requireRepoName(repoName), options));
}

async function pull(name: RepoName, options: PullOptions): Promise<PulledModel> {
  const client = new HubClient(options);
  const listing = await client.list(name);
  const { variant, files } = selectFiles(name.repo, listing.files, { ...options, folder: name.folder });
  const places = repoPlaces(options.cacheDir, name);
  const dir = variantDir(places, name, listing.commit, variant);
  const totalBytes = files.reduce((sum, { bytes }) => sum + bytes, 0);
  const pulled = { dir, commit: listing.commit, variant, files: files.length, totalBytes };
  try {
    await mkdir(dirname(dir), { recursive: true });
    const isCached = await whileLocked(`${dir}.lock`, options.onWait ?? (() => {}), async () => {
      if (await isDirectory(dir)) return true;
      const partial = `${dir}.partial`;
      await mkdir(partial, { recursive: true });
      const source = { client, name, commit: listing.commit };
      const here = new Map<string, number>();
      for (const file of files) here.set(file.path, await bytesAt(join(partial, file.localPath), file));
      const resumedBytes = sum(here);
      await checkFreeSpace(partial, totalBytes - resumedBytes, name.repo);
      for (const file of files) {
        const report = (bytes: number): void => {
          here.set(file.path, bytes);
          const { repo } = name;
          options.onProgress?.({ repo, file: file.path, doneBytes: sum(here), totalBytes, resumedBytes });
        };
        report(here.get(file.path) ?? 0);
        await downloadFile(source, file, join(partial, file.localPath), report);
      }
      await rename(partial, dir);
      return false;
    });
    await writeReference(places, listing.commit, variant);
    return { ...pulled, isCached };
  } catch (cause) {
    if (systemErrorCode(cause) === '') throw cause;
    const message = `cannot write ${name.repo} to ${dir} (${reasonOf(cause)}); give a writable cache directory`;
    throw new LaminaError('config_invalid', message, { cause });
  }
}

function sum(bytes: ReadonlyMap<string, number>): number {
  return [...bytes.values()].reduce((a, b) => a + b, 0);
}

/** What was pulled last of this revision, if it suits. */
async function findCached(name: RepoName, { cacheDir, weights, textOnly }: PullOptions): Promise<string | undefined> {
  const places = repoPlaces(cacheDir, name);
  const text = await readFile(places.reference, 'utf8').catch(() => undefined);
  const last = text === undefined ? undefined : referenceSchema.safeParse(parseJson(text)).data;
  // A commit needs no reference: it never moves.
  const commit = last?.commit ?? (/^[0-9a-f]{40}$/.test(name.revision) ? name.revision : undefined);
  if (commit === undefined) return undefined;
  const asked = name.folder === undefined ? weights : genaiVariant(name.folder);
  const wanted = asked ?? (last === undefined || last.variant === TEXT_VARIANT ? SAFETENSORS_VARIANT : last.variant);
  const candidates = textOnly === true ? [wanted, TEXT_VARIANT] : [wanted];
  for (const variant of candidates) {
    const dir = variantDir(places, name, commit, variant);
    if (await isDirectory(dir)) return dir;
  }
  return undefined;
}

async function writeReference({ reference }: RepoPlaces, commit: string, variant: string): Promise<void> {
  const before = await readFile(reference, 'utf8').catch(() => undefined);
  const known = before === undefined ? undefined : referenceSchema.safeParse(parseJson(before)).data;
  // Of one commit, what a gateway pulled says nothing about which weights were chosen.
  if (variant === TEXT_VARIANT && known?.commit === commit) return;
  await mkdir(dirname(reference), { recursive: true });
  const partial = `${reference}.${process.pid}.partial`;
  await writeFile(partial, JSON.stringify({ commit, variant }));
  await rename(partial, reference);
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

async function isDirectory(path: string): Promise<boolean> {
  return (await stat(path).catch(() => undefined))?.isDirectory() ?? false;
}
