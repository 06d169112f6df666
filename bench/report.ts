/** Owns how rows are shown: a line as they come, a markdown table of a file of rows. */
import { isReached, type Row } from './rows.ts';

function figure(value: number | null): string {
  if (value === null) return '-';
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

function verdict(row: Row): string {
  const reached = isReached(row);
  if (row.notMeasured !== null) return 'not measured';
  return reached === null ? '' : reached ? 'yes' : 'no';
}

const bound = ({ mustReach, bound }: Row): string =>
  mustReach === null ? '-' : `${bound === 'at most' ? '<= ' : ''}${mustReach}`;

export function lineOf(row: Row): string {
  const { part, name, peerName, unit } = row;
  if (row.notMeasured !== null) return `${part} ${name}: not measured: ${row.notMeasured}`;
  const shown = row.spread === null ? '' : ` +-${(50 * row.spread).toFixed(0)} %`;
  return (
    `${part} ${name}: ${figure(row.ours)} ${unit}, ${peerName} ${figure(row.peer)}, ratio ${figure(row.ratio)}${shown}` +
    `, must reach ${bound(row)} ${verdict(row)}`
  );
}

/** A markdown table. */
export function tableOf(rows: readonly Row[]): string {
  const lines = rows.map((row) =>
    [
      row.part,
      row.name,
      row.unit,
      figure(row.ours),
      figure(row.peer),
      row.peerName,
      figure(row.ratio),
      row.spread === null ? '-' : `${(100 * row.spread).toFixed(0)} %`,
      bound(row),
      verdict(row),
    ].join(' | '),
  );
  return [
    '| part | what | unit | ours | peer | peer is | ratio | spread | must reach | reached |',
    '|---|---|---|---:|---:|---|---:|---:|---:|---|',
    ...lines.map((line) => `| ${line} |`),
    '',
  ].join('\n');
}
