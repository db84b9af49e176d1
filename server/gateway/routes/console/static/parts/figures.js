// The figures of the system page: tiles of what changed within the last minute, and all that engines and jobs tell.
import { growth, quantile, total } from '../reading/metrics.js';
import { html } from './html.js';
import { figure, milliseconds } from './words.js';

const WINDOW_MS = 60_000;
const OWN = /^\/(ready|health|metrics|bank|console)/; // what the console itself asks, and probes
const others = ({ route }) => !OWN.test(route);
const answers = ({ level }) => Boolean(level);
const stage = (name) => (labels) => labels.stage === name;

export function Figures({ readings }) {
  const now = readings.at(-1);
  const then = readings.find(({ at }) => at >= now.at - WINDOW_MS) ?? now;
  const seconds = (now.at - then.at) / 1000;
  const perSecond = (name, passes) => {
    const grown = seconds ? growth(then, now, name, passes) : null;
    return grown === null ? '–' : `${figure(grown / seconds)} /s`;
  };
  const pair = (name, passes) => [0.5, 0.99].map((q) => {
    const value = quantile(then, now, name, q, passes);
    return milliseconds(value === null ? null : value * 1000);
  }).join(' · ');
  return html`<div class="tiles">
    <${Tile} name="Requests" value=${perSecond('mta_requests_total', others)}>
      <${Spark} values=${rates(readings, 'mta_requests_total', others)} />
    <//>
    <${Tile} name="Answers" value=${perSecond('mta_requests_total', answers)}>
      <${Spark} values=${rates(readings, 'mta_requests_total', answers)} />
    <//>
    <${Tile} name="First token, p50 · p99" value=${pair('mta_stage_seconds', stage('engine_ttft'))} />
    <${Tile} name="Between tokens, p50 · p99" value=${pair('mta_inter_token_seconds')} />
    ${GAUGES.map(([name, ...metrics]) => [name, metrics.map((metric) => total(now, metric))])
      .filter(([, values]) => values[0] !== null)
      .map(([name, values]) => html`<${Tile} key=${name} name=${name} value=${values.filter((value) => value !== null).map(figure).join(' of ')} />`)}
  </div>`;
}

const GAUGES = [];

function Tile({ name, value, children }) {
  return html`<section class="card tile" aria-label=${name}>
    <h2>${name}</h2><p class="value">${value}</p>${children}
  </section>`;
}

/** Growth per second between neighbouring readings. */
const rates = (readings, name, passes) => readings.slice(1).map((reading, index) => {
  const before = readings[index];
  return (growth(before, reading, name, passes) ?? 0) / ((reading.at - before.at) / 1000);
});

function Spark({ values }) {
  const most = Math.max(...values, 0.001);
  const points = values.map((value, index) => `${(index / Math.max(1, values.length - 1)) * 100},${29 - 28 * (value / most)}`);
  return html`<svg class="spark" viewBox="0 0 100 30" preserveAspectRatio="none" aria-hidden="true">
    <polyline points=${points.join(' ')} />
  </svg>`;
}
