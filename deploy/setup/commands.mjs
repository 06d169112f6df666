/** Owns the commands of bootstrap.mjs: which set-up each needs, and what it runs then. */
import { findNatsServer } from './nats-server.mjs';
import { buildNativeKernel, buildTypeScript, installBenchmarkPeers, installPackages } from './node-packages.mjs';
import { runInForeground, SetupError, say } from './run.mjs';

const BIN = {
  biome: 'node_modules/@biomejs/biome/bin/biome',
  knip: 'node_modules/knip/bin/knip.js',
  tsc: 'node_modules/typescript/bin/tsc',
  vitest: 'node_modules/vitest/vitest.mjs',
};

/** What `npm test` does shortly, in its long form: the variable that asks for it, and the files. */
const LONG_FORMS = {
  fuzz: {
    variable: 'LAMINA_FUZZ',
    files: [
      'packages/protocol/test/fuzz.test.ts',
      'packages/bus/test/server-lines.test.ts',
      'test/contract/tensor-link.test.ts',
      'test/e2e/hostile.test.ts',
      'test/e2e/hostile-frames.test.ts',
    ],
  },
  properties: {
    variable: 'LAMINA_PROPERTIES',
    files: [
      'services/kv-manager/test/kv-manager.property.test.ts',
      'test/contract/kv-manager-executor.property.test.ts',
    ],
  },
};
/** Says when each test ended, and what it prints when it prints it. */
const TELLING = ['--reporter=verbose', '--disable-console-intercept=true'];

/**
 * Everything that a running Lamina needs.
 * @param {{ needsNatsServer: boolean }} options
 * @returns {Promise<Record<string, string>>} what the command's environment gets in addition
 */
async function prepare({ needsNatsServer }) {
  await installPackages();
  const natsServer = needsNatsServer ? findNatsServer() : undefined;
  const [path] = await Promise.all([natsServer, buildTypeScript(), buildNativeKernel()]);
  return path === undefined ? {} : { LAMINA_NATS_SERVER: path };
}

/**
 * @param {'demo' | 'start'} command
 * @param {readonly string[]} args
 */
async function runCli(command, args) {
  const usesRunningServer = args.some((arg) => arg === '--nats-url' || arg.startsWith('--nats-url='));
  const environment = await prepare({ needsNatsServer: !usesRunningServer });
  return runInForeground(['packages/cli/dist/main.js', command, ...args], environment);
}

/** @param {readonly string[]} args passed to vitest */
async function runTests(args) {
  const environment = await prepare({ needsNatsServer: true });
  return runInForeground([BIN.vitest, 'run', ...args], environment);
}

/**
 * @param {keyof typeof LONG_FORMS} command
 * @param {readonly string[]} args test files instead of all, and options of vitest
 */
async function runLongForm(command, args) {
  const { variable, files } = LONG_FORMS[command];
  const isFile = (/** @type {string} */ arg) => !arg.startsWith('-');
  const environment = { ...(await prepare({ needsNatsServer: true })), [variable]: 'long' };
  return runInForeground([BIN.vitest, 'run', ...TELLING, ...(args.some(isFile) ? [] : files), ...args], environment);
}

/** @param {readonly string[]} args of `npm run chaos` */
async function runChaos(args) {
  const { readChaosArguments } = await import('../../test/chaos/run.mjs');
  return runWithVariables(readChaosArguments, args);
}

/** @param {readonly string[]} args of `npm run soak` */
async function runSoak(args) {
  const { readSoakArguments } = await import('../../test/chaos/soak-run.mjs');
  return runWithVariables(readSoakArguments, args);
}

/**
 * @param {(args: readonly string[]) => { environment: Record<string, string>, vitestArgs: string[] }} read
 * @param {readonly string[]} args
 */
async function runWithVariables(read, args) {
  const { environment, vitestArgs } = understood(read, args);
  return runInForeground([BIN.vitest, 'run', ...vitestArgs], {
    ...(await prepare({ needsNatsServer: true })),
    ...environment,
  });
}

/**
 * @template T
 * @param {(args: readonly string[]) => T} read
 * @param {readonly string[]} args
 * @returns {T}
 * @throws SetupError that says which argument is wrong
 */
function understood(read, args) {
  try {
    return read(args);
  } catch (error) {
    if (error instanceof TypeError) throw new SetupError(error.message);
    throw error;
  }
}

/**
 * The benchmark's peers are packages of its own, installed when they are first needed.
 * @param {readonly string[]} args
 */
async function runBench(args) {
  const environment = await prepare({ needsNatsServer: true });
  await buildTypeScript('bench');
  if (!['regress', 'report'].includes(args[0] ?? '')) await installBenchmarkPeers();
  return runInForeground(['bench/dist/main.js', ...args], environment);
}

async function runChecks() {
  await installPackages();
  const checks = [
    ['biome', [BIN.biome, 'check', '--error-on-warnings', '.']],
    ['tsc', [BIN.tsc, '-b', '.', 'bench']],
    ['tsc of the tests', [BIN.tsc, '-p', 'test/tsconfig.json']],
    ['knip', [BIN.knip]],
  ];
  let failed = 0;
  for (const [name, args] of checks) {
    const passed = (await runInForeground(args)) === 0;
    if (!passed) failed += 1;
    say(`check ${name}: ${passed ? 'passed' : 'failed'}`);
  }
  return failed === 0 ? 0 : 1;
}

/**
 * @param {string | undefined} command
 * @param {readonly string[]} args
 * @returns {Promise<number>} exit code
 */
export async function runCommand(command, args) {
  try {
    switch (command) {
      case 'demo':
      case 'start':
        return await runCli(command, args);
      case 'test':
        return await runTests(args);
      case 'bench':
        return await runBench(args);
      case 'chaos':
        return await runChaos(args);
      case 'soak':
        return await runSoak(args);
      case 'fuzz':
      case 'properties':
        return await runLongForm(command, args);
      case 'check':
        return await runChecks();
      default:
        say('usage: node deploy/bootstrap.mjs demo|start|test|bench|chaos|soak|fuzz|properties|check [args...]');
        return 2;
    }
  } catch (error) {
    if (!(error instanceof SetupError)) throw error;
    say(error.message);
    return 1;
  }
}
