/**
 * Owns which model a command is about: its name over LAMINA_MODEL over the bundled one, its directory, and which of its
 * weights.
 *
 * Invariants
 * 1. A directory is taken against the caller's working directory, the bundled model and the default cache against the
 *    checkout.
 * 2. `--weights` wins over LAMINA_WEIGHTS and LAMINA_ONNX_VARIANT; without it a command takes what a service would.
 */
import { resolve } from 'node:path';
import { chooseWeights, repoMeant, resolveModel, WEIGHT_FORMATS, type WeightsChoice } from '@lamina/model';
import { hubVariables, readConfig, SETTINGS } from '@lamina/runtime';
import { ROOT_DIRECTORY } from '../root.ts';
import { showPull } from './progress.ts';

export type Environment = Readonly<Record<string, string | undefined>>;

export interface FoundModel extends WeightsChoice {
  readonly dir: string;
}

export function modelNameOf(given: string | undefined, environment: Environment): string {
  return given || environment[SETTINGS.model.env] || resolve(ROOT_DIRECTORY, SETTINGS.model.fallback);
}

export function cacheDirOf(environment: Environment): string {
  const given = environment[SETTINGS.cacheDir.env];
  return given ? resolve(given) : resolve(ROOT_DIRECTORY, SETTINGS.cacheDir.fallback);
}

/**
 * Directory of the model; a repository of the hub is pulled if it is not cached.
 * @param variant Of a repository, which of its forms: `safetensors` or an ONNX variant; default: what was pulled last.
 */
export async function findModel(name: string, environment: Environment, variant?: string): Promise<string> {
  const shown = showPull(process.stderr);
  const options = { ...hubVariables(environment), cacheDir: cacheDirOf(environment), weights: variant };
  try {
    return await resolveModel(name, { ...options, ...shown });
  } finally {
    shown.done();
  }
}

/** The model and what `--weights`, if it is given, means for it. Throws an error that lists what there is. */
export async function findWeights(
  name: string,
  given: string | undefined,
  environment: Environment,
): Promise<FoundModel> {
  const { weights, onnxVariant: variant } = readConfig('dense-executor', [], environment);
  if (given === undefined) {
    const dir = await findModel(name, environment, variant);
    return { dir, weights, ...(variant === undefined ? {} : { variant }) };
  }
  const isFormat = WEIGHT_FORMATS.some((format) => format === given);
  const dir = await findModel(name, environment, isFormat ? undefined : given);
  try {
    return { dir, ...(await chooseWeights(dir, given)) };
  } catch (error) {
    // Formats and variants have names in common: of a repository, another form may be meant than the one that is here.
    if (!isFormat || (await repoMeant(name)) === undefined) throw error;
    return { dir: await findModel(name, environment, given), variant: given };
  }
}
