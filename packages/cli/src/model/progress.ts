/**
 * Owns progress on stderr: one line that changes on a terminal, a line now and then in a log.
 *
 * Invariants
 * 1. stdout is never written to: it holds a command's result and nothing else.
 * 2. On a terminal a line is no longer than the terminal is wide, so that it is written over, not scrolled.
 */
import { PullMeter, type PullProgress } from '@lamina/model';
import { bytesText, durationText } from '../table.ts';

/** What of process.stderr is used. */
export interface Screen {
  readonly isTTY?: boolean;
  readonly columns?: number;
  write(text: string): unknown;
}

const TERMINAL_EVERY_MS = 100;
const LOG_EVERY_MS = 5_000;
const BAR_CELLS = 20;

/** Writes at most one line per interval, the last one always. */
class ProgressLine {
  readonly #screen: Screen;
  #writtenAtMs = Number.NEGATIVE_INFINITY;
  #isOpen = false;

  constructor(screen: Screen) {
    this.#screen = screen;
  }

  show(line: string, isLast: boolean): void {
    const nowMs = performance.now();
    const everyMs = this.#screen.isTTY === true ? TERMINAL_EVERY_MS : LOG_EVERY_MS;
    if (!isLast && nowMs - this.#writtenAtMs < everyMs) return;
    this.#writtenAtMs = nowMs;
    if (this.#screen.isTTY !== true) {
      this.#screen.write(`${line}\n`);
      return;
    }
    this.#screen.write(`\r\u001b[2K${line.slice(0, (this.#screen.columns ?? 80) - 1)}`);
    this.#isOpen = true;
  }

  done(): void {
    if (this.#isOpen) this.#screen.write('\n');
    this.#isOpen = false;
  }
}

export interface ShownPull {
  onProgress(progress: PullProgress): void;
  onWait(): void;
  /** Leaves the line. */
  done(): void;
}

/** Shows a pull: how much of it, how fast, how long still, which file. */
export function showPull(screen: Screen, meter: PullMeter = new PullMeter()): ShownPull {
  const line = new ProgressLine(screen);
  let isFirst = true;
  return {
    onProgress: (progress) => {
      if (isFirst && progress.resumedBytes > 0) {
        screen.write(`${progress.repo}: continuing, ${bytesText(progress.resumedBytes)} are here already\n`);
      }
      isFirst = false;
      const { bytesPerSecond, secondsLeft } = meter.update(progress);
      const { doneBytes, totalBytes, file } = progress;
      const amount = `${bytesText(doneBytes)} of ${bytesText(totalBytes)}`;
      const left = secondsLeft === null ? '' : `, ${durationText(secondsLeft)} left`;
      const fraction = totalBytes === 0 ? 1 : doneBytes / totalBytes;
      const isLast = doneBytes === totalBytes;
      line.show(`${bar(fraction)} ${amount}   ${bytesText(bytesPerSecond)}/s${isLast ? '' : left}   ${file}`, isLast);
    },
    onWait: () => screen.write('another process pulls this model; waiting for it\n'),
    done: () => line.done(),
  };
}

/** Shows work whose parts are bytes: building, writing. */
export function showBytes(
  screen: Screen,
  what: string,
): { update(doneBytes: number, totalBytes: number): void; done(): void } {
  const line = new ProgressLine(screen);
  const meter = new PullMeter();
  const startedAtMs = performance.now();
  return {
    update: (doneBytes, totalBytes) => {
      // What takes no time needs no progress.
      const isLast = doneBytes === totalBytes;
      if (performance.now() - startedAtMs < 500) return;
      const { secondsLeft } = meter.update({ doneBytes, totalBytes });
      const left = isLast || secondsLeft === null ? '' : `   ${durationText(secondsLeft)} left`;
      const fraction = totalBytes === 0 ? 1 : doneBytes / totalBytes;
      line.show(`${what} ${bar(fraction)} ${bytesText(doneBytes)} of ${bytesText(totalBytes)}${left}`, isLast);
    },
    done: () => line.done(),
  };
}

function bar(fraction: number): string {
  const full = Math.floor(fraction * BAR_CELLS);
  return `[${'='.repeat(full)}${' '.repeat(BAR_CELLS - full)}] ${Math.floor(fraction * 100)
    .toString()
    .padStart(3)} %`;
}
