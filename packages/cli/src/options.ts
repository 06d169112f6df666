/**
 * Owns the options that `demo` and `start` share, and what they default to: flags over LAMINA_* variables over defaults.
 *
 * Invariants
 * 1. All LAMINA_* variables are checked here, before anything is started, and then passed on to the services as they are.
 * 2. Paths are made absolute here: services resolve nothing against their own working directory. A repository of the hub
 *    is pulled here, with its progress on stderr, so that services find it in the cache.
 */
import { natsServerOf, readConfig, SETTINGS } from '@lamina/runtime';
import { LaminaError } from '@lamina/tensor';
import type { ClusterFlags, PortDefaults } from './arguments.ts';
import type { ClusterOptions } from './cluster.ts';
import { cacheDirOf, findModel, modelNameOf } from './model/find-model.ts';

type Environment = Readonly<Record<string, string | undefined>>;

/** @throws LaminaError `config_invalid`, or what keeps the model from being pulled. */
export async function clusterOptionsOf(
  flags: ClusterFlags,
  defaults: PortDefaults,
  environment: Environment,
): Promise<Omit<ClusterOptions, 'signal'>> {
  const { onnxVariant } = readConfig('gateway', [], environment);
  const natsUrl = flags.natsUrl ?? (environment[SETTINGS.natsUrl.env] || undefined);
  if (natsUrl !== undefined && flags.natsPort !== undefined) {
    throw new LaminaError('config_invalid', 'give --nats-url (LAMINA_NATS_URL) or --nats-port, not both');
  }
  const httpPortOfEnvironment = environment[SETTINGS.httpPort.env];
  const model = await findModel(modelNameOf(flags.model, environment), environment, onnxVariant);
  return {
    attentionShards: flags.attentionShards,
    denseExecutors: flags.denseExecutors,
    natsPort: flags.natsPort ?? defaults.natsPort,
    httpPort: flags.httpPort ?? (httpPortOfEnvironment ? Number(httpPortOfEnvironment) : defaults.httpPort),
    natsUrl,
    natsServer: natsServerOf(environment),
    environment,
    settings: { model, cacheDir: cacheDirOf(environment) },
    ...(flags.verbose ? { onLine: (name, line) => process.stderr.write(`[${name}] ${line}\n`) } : {}),
  };
}
