// Parts of the Adapt page: the sample input and the table of answers.
import { html, useState } from '../parts/html.js';
import { Input, Level } from '../parts/widgets.js';
import { count } from '../parts/words.js';

const SHOWN = 3;
const MOST_BYTES = 8 << 20;

/** An input to drop, choose or paste samples. */
export function SampleInput({ text, onText, samples, faults }) {
	const [over, setOver] = useState(false);
	const [refused, setRefused] = useState('');
	const take = async (file) => {
		if (!file) return;
		setRefused(file.size > MOST_BYTES ? `${file.name} is larger than the limit of 8 MiB.` : '');
		if (file.size <= MOST_BYTES) onText(await file.text());
	};
	const drop = (event) => {
		event.preventDefault();
		setOver(false);
		take(event.dataTransfer.files[0]);
	};
	return html`<div class=${over ? 'drop over' : 'drop'} onDrop=${drop}
			onDragOver=${(event) => { event.preventDefault(); setOver(true); }} onDragLeave=${() => setOver(false)}>
		<${Input} area class="mono" rows="6" spellcheck=${false} label="Samples" value=${text} onValue=${onText}
			placeholder='{"input": "Any plans?", "output": "The sea. Always the sea."}'
			hint="NDJSON, JSON or CSV with input and output: paste them, or drop a file here." />
		<${Input} type="file" label="Or choose a file" accept=".ndjson,.jsonl,.json,.csv,.tsv,.txt"
			onChange=${(event) => take(event.target.files[0])} />
		<div role="status">
			${refused && html`<p class="fault">${refused}</p>`}
			${faults.length > 0 && html`<p class="fault">Left out: ${faults.slice(0, SHOWN).join('; ')}${
				faults.length > SHOWN ? `; and ${faults.length - SHOWN} more` : ''}.</p>`}
			${samples.length > 0 && html`<p>${count(samples.length, 'sample')}.</p>`}
		</div>
		${samples.length > 0 && html`<ul class="samples" aria-label="The first samples">
			${samples.slice(0, SHOWN).map(({ input, output }, index) => html`<li key=${index}>
				<p class="dim">${typeof input === 'string' ? input : input.map((message) => message?.content).join(' / ')}</p>
				<p>${output}</p>
			</li>`)}
		</ul>`}
	</div>`;
}

/** Answers to the same questions before and after training. */
export function BeforeAfter({ rows }) {
	return html`<section class="card" aria-label="Before and after">
		<h2>Before and after</h2>
		${rows.map(({ question, before, after }) => html`<article key=${question} class="versus">
			<h3>${question}</h3>
			<div class="pair">
				<${Side} title="Before" answer=${before} />
				<${Side} title="After" answer=${after} />
			</div>
		</article>`)}
	</section>`;
}

function Side({ title, answer }) {
	return html`<div>
		<p class="dim">${title} ${answer?.who && html`<${Level} level=${answer.who.level} />`}</p>
		<div class="text" aria-live="polite" aria-busy=${answer?.phase === 'streaming'}>
			${answer?.text || (answer && !answer.error ? '…' : '–')}
		</div>
		${answer?.error && html`<p class="fault" role="alert">${answer.error.message}</p>`}
	</div>`;
}
