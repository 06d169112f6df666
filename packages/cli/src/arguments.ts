/**
 * Owns the values of options and arguments: what they look like and their bounds. Loads nothing but the parser.
 */
import { type Command, InvalidArgumentError } from 'commander';

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
    .option(
      '--model <name>',
      'directory or owner/name of the hub (default: LAMINA_MODEL, else the bundled lamina-tiny)',
    )
    .option('--attention-shards <n>', 'attention shards to start', integer(1, 256), 2)
    .option('--dense-executors <n>', 'dense executors to start', integer(1, 256), 1)
    .option('--nats-port <port>', `port of nats-server, 0 = any free one (default: ${defaults.natsPort})`, port)
    .option('--http-port <port>', `port of the gateway, 0 = any free one (default: ${defaults.httpPort})`, port)
    .option('--nats-url <url>', 'use a nats-server that runs already (default: LAMINA_NATS_URL, else one is started)')
    .option('--verbose', 'show the logs of all processes on stderr');
}
