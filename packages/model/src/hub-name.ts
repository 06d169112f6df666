/**
 * Owns how a model is named: a directory, or a repository of the hub at a revision, or one folder of it
 * (`owner/name@revision:folder`); and where pulled repositories lie.
 *
 * Invariants
 * 1. What is a directory is never taken for a repository; `models/NAME` is always a path (the hub allows no such owner).
 * 2. The directory of a pulled model is called like its repository: its name is what requests call the model.
 */
import { join, resolve } from 'node:path';
import { LaminaError } from '@lamina/tensor';

export interface RepoName {
  /** `owner/name` */
  readonly repo: string;
  readonly owner: string;
  readonly name: string;
  /** Branch, tag or commit. */
  readonly revision: string;
  /** The folder of the repository in which the model is, with slashes; undefined where the name leaves it open. */
  readonly folder: string | undefined;
}

const DEFAULT_REVISION = 'main';

const PART = '[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?';
const FOLDER = '[A-Za-z0-9_][A-Za-z0-9._ +=/-]*';
const REPO = new RegExp(`^(${PART})/(${PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?(?::(${FOLDER}))?$`);

/** `owner/name`, with `@revision`, `:folder` or both behind it; undefined for anything else. */
export function parseRepoName(text: string): RepoName | undefined {
  const [, owner, name, revision = DEFAULT_REVISION, folder] = REPO.exec(text) ?? [];
  if (owner === undefined || name === undefined || owner === 'models') return undefined;
  if ([owner, name, revision, folder].some((part) => part?.includes('..'))) return undefined;
  return { repo: `${owner}/${name}`, owner, name, revision, folder: folder?.replace(/\/+$/, '') };
}

/** @throws LaminaError `config_invalid` */
export function requireRepoName(text: string): RepoName {
  const name = parseRepoName(text);
  if (name !== undefined) return name;
  const forms = 'owner/name, owner/name@revision or owner/name@revision:folder';
  throw new LaminaError('config_invalid', `"${text}" names no repository; write ${forms}`);
}

/** What of a repository was pulled: all of a variant, or only what a gateway reads. */
export interface RepoPlaces {
  /** Everything of this repository. */
  readonly root: string;
  /** File that says what the revision was when it was last pulled. */
  readonly reference: string;
}

export function repoPlaces(cacheDir: string, { owner, name, revision }: RepoName): RepoPlaces {
  const root = join(resolve(cacheDir), 'hub', owner, name);
  return { root, reference: join(root, 'refs', `${encodeURIComponent(revision)}.json`) };
}

/** Directory of one variant of one commit: complete when it exists. */
export function variantDir({ root }: RepoPlaces, { name }: RepoName, commit: string, variant: string): string {
  return join(root, `${commit.slice(0, 12)}-${encodeURIComponent(variant)}`, name);
}
