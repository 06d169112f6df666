#!/usr/bin/env node
/**
 * Owns the command line of `lamina`: its commands, options and exit status.
 *
 * Invariants
 * 1. A command's code is loaded when it runs and not before: `healthcheck` runs every minute in every container and must
 *    load no cluster, no model and no inference runtime.
 */
import { processEnvironment, SERVICES, VERSION } from '@lamina/runtime/config';
import { Argument, Command } from 'commander';
import { addClusterOptions, type ClusterFlags, integer, real } from './arguments.ts';
import type { DemoFlags } from './demo.ts';
import { addModelCommands } from './model/commands.ts';
import { addNatsCommands } from './nats-commands.ts';
import { finish } from './report.ts';

const DEMO_PORTS = { natsPort: 0, httpPort: 0 };
const START_PORTS = { natsPort: 4222, httpPort: 8080 };
const DEFAULT_PROMPT = 'Once upon a time, there was a little girl named Lily.';
const DEFAULT_SEED = 7;

const program = new Command('lamina')
  .description('Attention offloading for large language models over NATS')
  .version(VERSION)
  .showHelpAfterError('(lamina --help says more)');

addClusterOptions(program.command('demo'), DEMO_PORTS)
  .description('start a cluster, let it answer one prompt, show what each shard did, stop it')
  .argument('[prompt]', 'the text to continue', DEFAULT_PROMPT)
  .option('--seed <n>', 'the same seed gives the same story', integer(0, Number.MAX_SAFE_INTEGER), DEFAULT_SEED)
  .option('--max-tokens <n>', 'length of the answer', integer(1, 1_000_000))
  .option('--temperature <t>', '0 = always the likeliest token', real(0, 100))
  .action((prompt: string, flags: ClusterFlags & DemoFlags) =>
    finish(async () => {
      const { runDemo } = await import('./demo.ts');
      const { clusterOptionsOf } = await import('./options.ts');
      const { withCluster } = await import('./with-cluster.ts');
      const options = await clusterOptionsOf(flags, DEMO_PORTS, processEnvironment());
      return withCluster(options, (cluster) => runDemo(cluster, prompt, flags));
    }),
  );

addClusterOptions(program.command('start'), START_PORTS)
  .description('start a cluster and keep it up')
  .action((flags: ClusterFlags) =>
    finish(async () => {
      const { runStart } = await import('./start.ts');
      const { clusterOptionsOf } = await import('./options.ts');
      const { withCluster } = await import('./with-cluster.ts');
      return withCluster(await clusterOptionsOf(flags, START_PORTS, processEnvironment()), runStart);
    }),
  );

addModelCommands(program.command('model'));

addNatsCommands(program.command('nats'));

program
  .command('healthcheck')
  .description('exit 0 if the service on this host is well, else 1: for containers')
  .addArgument(new Argument('<service>', 'which one').choices(SERVICES))
  .action((service: (typeof SERVICES)[number]) =>
    finish(async () => {
      const { checkHealth } = await import('./healthcheck.ts');
      await checkHealth(service, processEnvironment());
      return 0;
    }),
  );

await program.parseAsync();
