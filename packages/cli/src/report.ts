/**
 * Owns how a command says that it failed.
 *
 * Invariants
 * 1. A failure is one line `lamina: what and what to do [code]`; logs come before it only where they are all there is.
 */
import { asLaminaError, type LaminaError } from '@lamina/tensor';

export function reportFailure(error: LaminaError): void {
  const log = error.diagnostics.log;
  const { reason } = error.diagnostics;
  if (Array.isArray(log)) for (const line of log) process.stderr.write(`  ${String(line)}\n`);
  process.stderr.write(`lamina: ${error.message}${typeof reason === 'string' ? ` (${reason})` : ''} [${error.code}]\n`);
}

/** Runs a command and ends the process with its status. */
export async function finish(run: () => Promise<number>): Promise<void> {
  try {
    process.exitCode = await run();
    // What was written to a pipe is still on its way when process.exit is called.
    await new Promise<void>((resolve) => process.stdout.write('', () => resolve()));
    process.exit();
  } catch (cause) {
    reportFailure(asLaminaError(cause));
    process.exit(1);
  }
}
