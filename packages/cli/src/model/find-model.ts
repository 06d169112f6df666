/**
 * Owns which model a command is about: its name over LAMINA_MODEL over the bundled one, and its directory.
 *
 * Invariants
 * 1. A directory is taken against the caller's working directory, the bundled model and the default cache against the
 *    checkout.
 */
import { resolve } from 'node:path';
import { resolveModel } from '@lamina/model';
import { hubVariables, SETTINGS } from '@lamina/runtime';
import { ROOT_DIRECTORY } from '../root.ts';
import { showPull } from './progress.ts';

export type Environment = Readonly<Record<string, string | undefined>>;

export function modelNameOf(given: string | undefined, environment: Environment): string {
  return given || environment[SETTINGS.model.env] || resolve(ROOT_DIRECTORY, SETTINGS.model.fallback);
}

export function cacheDirOf(environment: Environment): string {
  const given = environment[SETTINGS.cacheDir.env];
  return given ? resolve(given) : resolve(ROOT_DIRECTORY, SETTINGS.cacheDir.fallback);
}

/** Directory of the model; a repository of the hub is pulled if it is not cached. */
export async function findModel(name: string, environment: Environment): Promise<string> {
  const shown = showPull(process.stderr);
  try {
    return await resolveModel(name, { ...hubVariables(environment), cacheDir: cacheDirOf(environment), ...shown });
  } finally {
    shown.done();
  }
}
