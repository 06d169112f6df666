#!/usr/bin/env node
/**
 * Owns the command line of `lamina`: its commands, options and exit status.
 */
import { processEnvironment, SERVICES, VERSION } from '@lamina/runtime';
import { asLaminaError } from '@lamina/tensor';
import { Argument, Command } from 'commander';
import { DEFAULT_PROMPT, DEFAULT_SEED, type DemoFlags, runDemo } from './demo.ts';
import { checkHealth } from './healthcheck.ts';
import { addClusterOptions, type ClusterFlags, clusterOptionsOf, integer, real } from './options.ts';
import { runStart } from './start.ts';
import { reportFailure, withCluster } from './with-cluster.ts';

const DEMO_PORTS = { natsPort: 0, httpPort: 0 };
const START_PORTS = { natsPort: 4222, httpPort: 8080 };

/** Runs a command and ends the process with its status. */
async function finish(run: () => Promise<number>): Promise<void> {
  try {
    process.exit(await run());
  } catch (cause) {
    reportFailure(asLaminaError(cause));
    process.exit(1);
  }
}

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
    finish(() =>
      withCluster(clusterOptionsOf(flags, DEMO_PORTS, processEnvironment()), (cluster) =>
        runDemo(cluster, prompt, flags),
      ),
    ),
  );

addClusterOptions(program.command('start'), START_PORTS)
  .description('start a cluster and keep it up')
  .action((flags: ClusterFlags) =>
    finish(() => withCluster(clusterOptionsOf(flags, START_PORTS, processEnvironment()), runStart)),
  );

program
  .command('healthcheck')
  .description('exit 0 if the service on this host is well, else 1: for containers')
  .addArgument(new Argument('<service>', 'which one').choices(SERVICES))
  .action((service: (typeof SERVICES)[number]) =>
    finish(async () => {
      await checkHealth(service, processEnvironment());
      return 0;
    }),
  );

await program.parseAsync();
