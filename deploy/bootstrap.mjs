/**
 * Owns the npm scripts: `node deploy/bootstrap.mjs <demo|start|test|bench|chaos|soak|fuzz|properties|check> [args...]` sets up what is missing and then
 * runs the command. Plain Node without packages, because it runs before any package is installed. Says only what it does.
 */
import process from 'node:process';

const MINIMUM_NODE = [20, 19];

const [major = 0, minor = 0] = process.versions.node.split('.').map(Number);
if (major < MINIMUM_NODE[0] || (major === MINIMUM_NODE[0] && minor < MINIMUM_NODE[1])) {
  process.stderr.write(
    `Lamina needs Node ${MINIMUM_NODE.join('.')} or later; this is ${process.versions.node}. Install a current Node from https://nodejs.org/\n`,
  );
  process.exit(1);
}

const { runCommand } = await import('./setup/commands.mjs');
process.exitCode = await runCommand(process.argv[2], process.argv.slice(3));
