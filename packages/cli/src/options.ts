/**
 * Owns the options that `demo` and `start` share, and what they default to: flags over LAMINA_* variables over defaults.
 *
 * Invariants
 * 1. All LAMINA_* variables are checked here, before anything is started, and then passed on to the services as they are.
 * 2. Paths are made absolute here: services resolve nothing against their own working directory.
 */
import { resolve } from 'node:path';
import { readConfig, SETTINGS } from '@lamina/runtime';
import { LaminaError } from '@lamina/tensor';
import { type Command, InvalidArgumentError } from 'commander';
import { type ClusterOptions, ROOT_DIRECTORY } from './cluster.ts';

export interface ClusterFlags {
  readonly model?: string;
  readonly attentionShards: number;
  readonly denseExecutors: number;
  readonly natsPort?: number;
  readonly httpPort?: number;
  readonly natsUrl?: string;
  readonly verbose?: true;
}

export interface PortDefaults {
  readonly natsPort: number;
  readonly httpPort: number;
}

type Environment = Readonly<Record<string, string | undefined>>;

/** Parses an option as an integer within bounds. */
export const integer =
  (minimum: number, maximum: number) =>
  (text: string): number => {
    const value = Number(text);
    if (text.trim() !== '' && Number.isInteger(value) && value >= minimum && value <= maximum) return value;
    throw new InvalidArgumentError(`It must be an integer from ${minimum} to ${maximum}.`);
  };

/** Parses an option as a number within bounds. */
export const real =
  (minimum: number, maximum: number) =>
  (text: string): number => {
    const value = Number(text);
    if (text.trim() !== '' && value >= minimum && value <= maximum) return value;
    throw new InvalidArgumentError(`It must be a number from ${minimum} to ${maximum}.`);
  };

export function addClusterOptions(command: Command, defaults: PortDefaults): Command {
  const port = integer(0, 65_535);
  return command
    .option('--model <dir>', 'directory of the model (default: LAMINA_MODEL, else the bundled lamina-tiny)')
    .option('--attention-shards <n>', 'attention shards to start', integer(1, 256), 2)
    .option('--dense-executors <n>', 'dense executors to start', integer(1, 256), 1)
    .option('--nats-port <port>', `port of nats-server, 0 = any free one (default: ${defaults.natsPort})`, port)
    .option('--http-port <port>', `port of the gateway, 0 = any free one (default: ${defaults.httpPort})`, port)
    .option('--nats-url <url>', 'use a nats-server that runs already (default: LAMINA_NATS_URL, else one is started)')
    .option('--verbose', 'show the logs of all processes on stderr');
}

/** @throws LaminaError `config_invalid` */
export function clusterOptionsOf(
  flags: ClusterFlags,
  defaults: PortDefaults,
  environment: Environment,
): Omit<ClusterOptions, 'signal'> {
  readConfig('gateway', [], environment);
  const natsUrl = flags.natsUrl ?? (environment[SETTINGS.natsUrl.env] || undefined);
  if (natsUrl !== undefined && flags.natsPort !== undefined) {
    throw new LaminaError('config_invalid', 'give --nats-url (LAMINA_NATS_URL) or --nats-port, not both');
  }
  const httpPortOfEnvironment = environment[SETTINGS.httpPort.env];
  const model = flags.model ?? environment[SETTINGS.model.env];
  const cacheDir = environment[SETTINGS.cacheDir.env];
  return {
    attentionShards: flags.attentionShards,
    denseExecutors: flags.denseExecutors,
    natsPort: flags.natsPort ?? defaults.natsPort,
    httpPort: flags.httpPort ?? (httpPortOfEnvironment ? Number(httpPortOfEnvironment) : defaults.httpPort),
    natsUrl,
    natsServer: natsServerOf(environment),
    environment,
    settings: {
      model: model ? resolve(model) : resolve(ROOT_DIRECTORY, SETTINGS.model.fallback),
      cacheDir: cacheDir ? resolve(cacheDir) : resolve(ROOT_DIRECTORY, SETTINGS.cacheDir.fallback),
    },
    ...(flags.verbose ? { onLine: (name, line) => process.stderr.write(`[${name}] ${line}\n`) } : {}),
  };
}

/** The binary that the launcher script found, else whatever PATH has. */
export function natsServerOf(environment: Environment): string {
  return environment.LAMINA_NATS_SERVER || 'nats-server';
}
