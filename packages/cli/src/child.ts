/**
 * Owns one child process: its start, its last log lines, its end.
 *
 * Invariants
 * 1. A child is in a process group of its own, so Ctrl-C in a terminal reaches the launcher only and children end in order.
 * 2. At most LOG_LINES lines of a child are kept.
 * 3. `ended` resolves exactly once and never rejects; a child that could not be started has ended.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { isErrorCode, LaminaError } from '@lamina/tensor';

export interface ChildOptions {
  /** What it is called in messages: `gateway`, `attention-shard 2`. */
  readonly name: string;
  readonly command: string;
  readonly args: readonly string[];
  readonly environment: Readonly<Record<string, string | undefined>>;
  /** Shows each line of its log as it comes. */
  readonly onLine?: ((name: string, line: string) => void) | undefined;
}

const LOG_LINES = 200;
/** What runService prints last when a service cannot start: `lamina gateway: what and what to do [code]`. */
const FAILURE_START = /^lamina [a-z-]+: /;
const FAILURE_CODE = / \[([a-z_]+)\]$/;

export class Child {
  readonly name: string;
  readonly ended: Promise<LaminaError>;
  readonly #process: ChildProcess;
  readonly #lines: string[] = [];
  #isRunning = true;
  #isStopping = false;

  constructor(options: ChildOptions) {
    this.name = options.name;
    const child = spawn(options.command, options.args, {
      env: options.environment,
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: true,
    });
    this.#process = child;
    for (const input of [child.stdout, child.stderr]) {
      createInterface({ input, crlfDelay: Number.POSITIVE_INFINITY }).on('line', (line) => {
        this.#lines.push(line);
        if (this.#lines.length > LOG_LINES) this.#lines.shift();
        options.onLine?.(this.name, line);
      });
    }
    this.ended = new Promise((resolve) => {
      child.once('error', (cause) => {
        this.#isRunning = false;
        resolve(new LaminaError('internal', `${this.name} could not be started: ${cause.message}`, { cause }));
      });
      child.once('close', (status, signal) => {
        this.#isRunning = false;
        resolve(this.#endedBecause(status, signal));
      });
    });
  }

  get pid(): number | undefined {
    return this.#process.pid;
  }

  get isRunning(): boolean {
    return this.#isRunning;
  }

  /** True once it was told to end: its end is then no failure. */
  get isStopping(): boolean {
    return this.#isStopping;
  }

  /** Its last log lines. */
  get log(): readonly string[] {
    return this.#lines;
  }

  /** Sends a signal and leaves what follows to whoever watches: for tests of failures. */
  kill(signal: NodeJS.Signals): void {
    this.#process.kill(signal);
  }

  /** SIGTERM, then SIGKILL after `graceMs`. Resolves when it is gone. */
  async stop(graceMs: number): Promise<void> {
    this.#isStopping = true;
    if (!this.#isRunning) return;
    this.#process.kill('SIGTERM');
    const timer = setTimeout(() => this.#process.kill('SIGKILL'), graceMs);
    await this.ended;
    clearTimeout(timer);
  }

  #endedBecause(status: number | null, signal: NodeJS.Signals | null): LaminaError {
    const start = this.#lines.findLastIndex((line) => FAILURE_START.test(line));
    const text = start < 0 ? '' : this.#lines.slice(start).join('\n');
    const code = FAILURE_CODE.exec(text)?.[1];
    if (isErrorCode(code)) {
      const reason = text.replace(FAILURE_START, '').replace(FAILURE_CODE, '');
      return new LaminaError(code, `${this.name}: ${reason}`);
    }
    const how = signal === null ? `with status ${status}` : `by ${signal}`;
    return new LaminaError('internal', `${this.name} ended ${how}`, { diagnostics: { log: this.#lines.slice(-20) } });
  }
}
